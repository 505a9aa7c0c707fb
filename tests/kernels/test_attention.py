"""The attention operators of the compiled backend against the fp64 reference."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import greenmim_kernels as gk
from greenmim_kernels import reference
from greenmim_kernels.testing import (
    Case,
    Inputs,
    assert_backend_agrees,
    make_inputs,
    relative_error,
    run,
    visible_tokens,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
CASES = [
    Case(),
    Case(shifted=True, num_heads=4, batch=3),
    Case(stage=2, shifted=True, head_dim=16, batch=1),
    Case(stage=3, num_heads=3, head_dim=8),
    Case(stage=4, num_heads=8, head_dim=64),
    Case(window_size=14, shifted=True, head_dim=64),
    Case(window_size=14, stage=2),
    Case(per_image=True, batch=3, shifted=True),
    Case(image_size=(160, 288), window_size=6, shifted=True, head_dim=5),
    Case(image_size=(32, 32), mask_ratio=0, head_dim=1, num_heads=1, batch=5),
    Case(mask_ratio=0, window_size=7, head_dim=17, num_heads=1),
    Case(mask_ratio=0.97, window_size=4, shifted=True),
]


def results(inputs: Inputs, backend: str, attention=gk.group_window_attention):
    with gk.use_backend(backend):
        return run(inputs, attention)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_reference(case, dtype):
    assert_backend_agrees(make_inputs(dataclasses.replace(case, dtype=dtype)), "cpp")


@settings(max_examples=40, deadline=None)
@given(
    st.builds(
        Case,
        image_size=st.tuples(st.integers(1, 4), st.integers(1, 4)).map(
            lambda units: (32 * units[0], 32 * units[1])
        ),
        stage=st.integers(1, 4),
        window_size=st.integers(1, 9),
        shifted=st.booleans(),
        batch=st.integers(1, 3),
        num_heads=st.integers(1, 3),
        head_dim=st.integers(1, 40),
        mask_ratio=st.sampled_from([0.0, 0.3, 0.6]),
        per_image=st.booleans(),
        dtype=st.sampled_from(DTYPES),
    ),
    st.integers(0, 1000),
)
def test_agrees_with_the_reference_on_drawn_shapes(case, seed):
    assert_backend_agrees(make_inputs(case, seed), "cpp")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("per_image", [False, True])
def test_block_diagonal_attention_neither_reads_nor_fills_padding(dtype, per_image):
    inputs = make_inputs(Case(batch=2, per_image=per_image, dtype=dtype, shifted=True))
    part = inputs.part
    padding = (part.token_index < 0).expand(2, -1, -1)
    assert padding.any()

    def grouped(qkv, table, part, num_heads):
        with gk.use_backend("reference"):
            x = gk.group_gather(qkv, part)
        x = x.masked_fill(padding[..., None], math.nan).detach().requires_grad_()
        out = gk.block_diagonal_attention(x, table, part, num_heads)
        grouped.x, grouped.out = x, out
        return out

    qkv, table = inputs.qkv, inputs.table.requires_grad_()
    with gk.use_backend("cpp"):
        out = grouped(qkv, table, part, inputs.num_heads)
        grad = reference.group_gather(inputs.grad_out, part.token_index)
        grad = grad.masked_fill(padding[..., None], math.nan)
        grad_x, grad_table = torch.autograd.grad(out, (grouped.x, table), grad)
    assert (out[padding] == 0).all()
    assert (grad_x[padding] == 0).all()
    # The same numbers as the fused operator, bit by bit: they share the kernel.
    fused = results(inputs, "cpp")
    index, tokens = part.token_index, part.num_tokens
    assert torch.equal(reference.group_scatter(out, index, tokens), fused["out"])
    assert torch.equal(reference.group_scatter(grad_x, index, tokens), fused["grad_qkv"])
    assert torch.equal(grad_table, fused["grad_table"])


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_padding_is_zero_beside_what_is_not_finite(backend):
    inputs = make_inputs(Case(stage=2, shifted=True))
    part = inputs.part
    padding = (part.token_index < 0).expand(2, -1, -1)
    assert padding.any()
    for value, which in ((math.inf, "qkv"), (math.inf, "grad_out"), (math.nan, "qkv")):
        poisoned = dataclasses.replace(
            inputs, **{which: torch.full_like(getattr(inputs, which), value)}
        )
        with gk.use_backend(backend):
            x = gk.group_gather(poisoned.qkv, part).requires_grad_()
            out = gk.block_diagonal_attention(x, inputs.table, part, inputs.num_heads)
            (grad_x,) = torch.autograd.grad(out, x, gk.group_gather(poisoned.grad_out, part))
        assert (out[padding] == 0).all()
        assert (grad_x[padding] == 0).all()


def test_without_a_bias_table_and_with_a_scale():
    inputs = make_inputs(Case(shifted=True))
    outs = {}
    for backend in ("cpp", "reference"):
        qkv = inputs.qkv.detach().requires_grad_()
        with gk.use_backend(backend):
            out = gk.group_window_attention(qkv, None, inputs.part, inputs.num_heads, scale=0.5)
        outs[backend] = out, *torch.autograd.grad(out, qkv, inputs.grad_out)
    for ours, expected in zip(outs["cpp"], outs["reference"], strict=True):
        torch.testing.assert_close(ours, expected)
    zeros = torch.zeros_like(inputs.table)
    with gk.use_backend("cpp"):
        same = gk.group_window_attention(inputs.qkv, zeros, inputs.part, inputs.num_heads, 0.5)
        other = gk.group_window_attention(inputs.qkv, zeros, inputs.part, inputs.num_heads)
    assert torch.equal(same, outs["cpp"][0])
    assert not torch.allclose(same, other)


def test_capacity_changes_nothing():
    case = Case(shifted=True)
    inputs = make_inputs(case)
    window, shift = case.window_and_shift()
    capacity = gk.partition_capacity(case.grid, window, shift, inputs.part.num_tokens)
    expected = results(inputs, "reference")
    for backend in ("cpp", "reference"):
        padded = dataclasses.replace(
            inputs,
            part=gk.group_partition(visible_tokens(case), window, shift, capacity=capacity),
        )
        assert padded.part.num_groups == capacity
        for name, value in results(padded, backend).items():
            assert relative_error(value, expected[name]) < 1e-5, name


def test_windows_in_any_order_within_a_group():
    """A partition made by hand need not be sorted by window."""
    inputs = make_inputs(Case())
    part = inputs.part
    order = torch.randperm(part.group_size, generator=torch.Generator().manual_seed(0))
    mixed = part.map(lambda tensor: tensor[..., order].contiguous())
    expected = results(inputs, "reference")
    for name, value in results(dataclasses.replace(inputs, part=mixed), "cpp").items():
        assert relative_error(value, expected[name]) < 1e-5, name


def test_a_nan_stays_in_its_window():
    case = Case(batch=1)
    inputs = make_inputs(case)
    index = inputs.part.token_index[0]
    window = inputs.part.window_id[0]
    token = int(index[0, 0])
    peers = index[window == window[0, 0]].long()
    inputs.qkv[0, token] = math.nan
    with gk.use_backend("cpp"):
        out = gk.group_window_attention(inputs.qkv, inputs.table, inputs.part, inputs.num_heads)
    hit = out[0].isnan().all(-1)
    assert sorted(hit.nonzero().flatten().tolist()) == sorted(peers.tolist())
    assert out[0, ~hit].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_gathered_groups_of_one_slot(backend):
    """An axis of size 1 has any stride in a contiguous tensor: it leads nowhere."""
    part = gk.group_partition(torch.ones(20, 30, dtype=torch.bool), 1, group_size=1)
    assert part.group_size == 1
    x = torch.randn(2, 1, part.num_groups, 3 * 32).transpose(1, 2)
    assert x.is_contiguous() and x.stride(2) != 96
    x.requires_grad_()
    table = torch.zeros(part.table_rows, 2)
    with gk.use_backend(backend):
        out = gk.block_diagonal_attention(x, table, part, 2)
        out.sum().backward()
    assert torch.equal(out, x[..., 64:])  # one key: its value
    assert (x.grad[..., 64:] == 1).all() and (x.grad[..., :64] == 0).all()


def test_subnormal_float16_where_a_thread_flushes_them():
    x = torch.full((1, 1, 6), 2.0**-20, dtype=torch.float16)
    part = gk.group_partition(torch.ones(1, 1, dtype=torch.bool), 1)
    usual = torch.set_flush_denormal(True)
    try:
        with gk.use_backend("cpp"):
            out = gk.group_window_attention(x, None, part, 1)
    finally:
        torch.set_flush_denormal(False)
    assert usual and (out == 2.0**-20).all()


def test_large_scores_do_not_overflow():
    inputs = make_inputs(Case())
    inputs.qkv[..., : 2 * 64] *= 40.0
    assert_backend_agrees(inputs, "cpp")


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_bits_for_any_number_of_threads(threads):
    inputs = make_inputs(Case(batch=4, num_heads=4, shifted=True))
    expected = results(inputs, "cpp")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(2):
            for name, value in results(inputs, "cpp").items():
                assert torch.equal(value, expected[name]), name
    finally:
        torch.set_num_threads(before)
