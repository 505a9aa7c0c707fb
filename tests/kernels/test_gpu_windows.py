"""The kernels for a GPU on windows of every kind: padding, volumes, heads of any width, strides.

Triton's run in its interpreter where there is no GPU, started by a test of test_gpu_kernels.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from budget import plain_results
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kernel_backends import DEVICE, INTERPRETED, kernel_test
from window_cases import (
    HEADS,
    Windows,
    problems,
    scale_error,
    similar_keys,
    swin,
    volume,
    window_inputs,
)

import greenmim_kernels as gk
from greenmim_kernels.testing import assert_within_budget, relative_error, run

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_device(inputs):
    tensors = ("qkv", "table", "grad_out", "part", "pad_value")
    found = {name: getattr(inputs, name) for name in tensors}
    moved = {name: x if x is None else x.to(DEVICE) for name, x in found.items()}
    return dataclasses.replace(inputs, **moved)


def apart(qkv, *arguments, **named):
    """q, k and v as tensors of their own: one head by head, one a view, one by itself."""
    q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).unbind(2)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    return gk.group_window_attention((q, k, v.contiguous()), *arguments, **named)


def assert_agrees(problem: Windows, dtype, head_dim, backend, attention, batch=None):
    inputs = on_device(window_inputs(problem, dtype, head_dim, batch))
    with gk.use_backend(backend):
        actual = run(inputs, attention)
        for name, value in run(inputs, attention).items():
            assert torch.equal(value, actual[name]), f"{name} differs between two runs"
    with gk.use_backend("reference"):
        exact = run(inputs.to(torch.float64))
    saved_output = inputs.part.group_size > 64 or head_dim > 32
    assert_within_budget(actual, plain_results(inputs, saved_output), exact)


@kernel_test
@pytest.mark.usefixtures("poisoned_memory")
# No shrinking: the interpreter takes seconds for an example.
@settings(
    max_examples=8 if INTERPRETED else 60,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    problem=problems(),
    head_dim=st.sampled_from((4, 12, 16, 32, 48)),
    dtype=st.sampled_from(DTYPES),
    attention=st.sampled_from((gk.group_window_attention, apart)),
)
def test_windows_of_every_kind(problem, head_dim, dtype, attention, backend):
    batch = max(2, len(problem.index))
    assert_agrees(problem, dtype, head_dim, backend, attention, batch)


@kernel_test
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("dtype", "attention"),
    [
        (torch.float32, apart),
        (torch.bfloat16, gk.group_window_attention),
        *[(torch.float16, apart), (torch.bfloat16, apart)][: 0 if INTERPRETED else 2],
    ],
)
@pytest.mark.parametrize(
    ("problem", "head_dim"),
    [(swin(), 32), (swin((20, 9), (7, 7), (3, 3)), 16), (volume((2, 7, 10), (2, 7, 7)), 8)],
    ids=["swin", "swin7", "volume"],
)
def test_padding_volumes_and_heads_of_any_width(problem, head_dim, attention, dtype, backend):
    assert_agrees(problem, dtype, head_dim, backend, attention, batch=3)


@kernel_test
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(
    ("problem", "head_dim"),
    [(swin((16, 16), (8, 8), (4, 4)), 30), (volume((2, 7, 10), (2, 7, 7)), 10)],
    ids=["short", "long"],
)
def test_heads_of_image_restoration(problem, head_dim, dtype):
    """180 / 6 in SwinIR, HAT and others, 60 / 6 in small ones: rows that begin at 4 bytes."""
    assert_agrees(problem, dtype, head_dim, "triton", gk.group_window_attention, batch=2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("window", [(7, 7, 7), (16, 7, 7)])
def test_windows_of_videos(window, dtype, backend):
    problem = volume(tuple(2 * m - 1 for m in window), window)
    assert_agrees(problem, dtype, 32, backend, gk.group_window_attention, batch=3)


@kernel_test
def test_tokens_in_no_window_are_zero(backend):
    index = torch.tensor([[[3, -1, 5], [8, 9, 1]]])
    problem = Windows(index, {}, torch.ones(2, 3, 3).bool(), torch.zeros(2, 3, 3).long(), 0, 40)
    inputs = on_device(window_inputs(problem, torch.float32, 16, batch=2))
    inside = index[index >= 0]
    outside = [i for i in range(40) if i not in inside]
    for x in (inputs.qkv, inputs.grad_out):  # nobody reads what may be anything
        x[:, outside] = torch.nan
    with gk.use_backend(backend):
        found = run(inputs)
    for value in (found["out"], found["grad_qkv"]):
        assert (value[:, outside] == 0).all() and (value[:, inside] != 0).all()


@kernel_test
def test_a_logit_scale_of_100_keeps_its_gradient(backend):
    """Rows of the scores' gradient add up to zero; else 1e-4 of the gradient is lost in float32."""
    inputs = on_device(window_inputs(swin(), torch.float32, 32))

    def cosine(qkv, *arguments, **named):
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).unbind(2)
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
        scale = torch.full((HEADS,), 100.0, dtype=qkv.dtype, device=qkv.device)
        return gk.group_window_attention((q, k, v), *arguments, scale=scale, **named)

    with gk.use_backend(backend):
        actual = run(inputs, cosine)
    with gk.use_backend("reference"):
        plain, exact = run(inputs, cosine), run(inputs.to(torch.float64), cosine)
    assert_within_budget(actual, plain, exact, factor=3)


@kernel_test
def test_a_large_scale_keeps_its_gradient_in_long_groups(backend):
    """Rows of the scores' gradient add up to zero, though the output is rounded to 16 bits."""
    inputs = similar_keys(10, 112, torch.bfloat16, DEVICE)
    qkv = inputs.qkv.requires_grad_()
    with gk.use_backend(backend):
        out = gk.group_window_attention(qkv, inputs.table, inputs.part, 1, 100.0)
    (grad,) = torch.autograd.grad(out, qkv, inputs.grad_out)
    assert scale_error(grad, inputs, 100.0) < 0.2  # 1.3 where delta keeps the output's rounding


@kernel_test
def test_a_scale_is_a_number_or_a_tensor(backend):
    inputs = on_device(window_inputs(swin(), torch.float32, 16))
    arguments = (inputs.qkv, inputs.table, inputs.part, HEADS)
    with gk.use_backend(backend):
        expected = gk.group_window_attention(*arguments, 0.7)
        for scale in (torch.tensor(0.7), torch.tensor([0.7, 0.7])):
            out = gk.group_window_attention(*arguments, scale.to(DEVICE))
            assert relative_error(out, expected) < 1e-5
