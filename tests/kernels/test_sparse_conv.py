"""sparse_depthwise_conv: the reference against a dense convolution, the C++ kernel against it."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from conv_cases import ConvInputs, conv_agrees, make_conv, run_conv, visible_grids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import greenmim_kernels as gk
from greenmim_kernels.ops import operator

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def run_cpp(inputs: ConvInputs) -> dict[str, torch.Tensor]:
    with gk.use_backend("cpp"):
        return run_conv(inputs)


@pytest.mark.parametrize("per_image", [False, True])
def test_the_reference_is_a_dense_convolution_with_zeros_for_what_is_hidden(per_image):
    inputs = make_conv(4, (5, 7), per_image=per_image, dtype=torch.float64)
    visible = visible_grids((5, 7), 3 if per_image else 1)
    on_map = torch.from_numpy(np.broadcast_to(visible, (3, 5, 7)).copy())
    leaves = [t.clone().requires_grad_() for t in (inputs.x, inputs.weight, inputs.bias)]
    x, weight, bias = leaves
    dense = x.new_zeros(3, 5, 7, 4).masked_scatter(on_map[..., None], x)
    out = F.conv2d(dense.permute(0, 3, 1, 2), weight.view(4, 1, 3, 3), bias, padding=1, groups=4)
    out = out.permute(0, 2, 3, 1)[on_map].view(x.shape)
    expected = (out, *torch.autograd.grad(out, leaves, inputs.grad_out))
    with gk.use_backend("reference"):
        for found, right in zip(run_conv(inputs).values(), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=0, atol=1e-12)
        square = dataclasses.replace(inputs, weight=inputs.weight.view(4, 1, 3, 3))
        assert torch.equal(run_conv(square)["out"], run_conv(inputs)["out"])


def test_neighbours_of_a_grid():
    visible = np.array([[True, True, False], [False, True, True]])
    # Tokens 0 1 . / . 2 3; places row by row.
    expected = [
        [-1, -1, -1, -1, 0, 1, -1, -1, 2],
        [-1, -1, -1, 0, 1, -1, -1, 2, 3],
        [0, 1, -1, -1, 2, 3, -1, -1, -1],
        [1, -1, -1, 2, 3, -1, -1, -1, -1],
    ]
    found = gk.grid_neighbours(visible)
    assert found.dtype == torch.int32 and found.is_contiguous() and found.tolist() == [expected]
    assert torch.equal(gk.grid_neighbours(torch.from_numpy(visible)), found)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 7, 16, 37, 96])
@pytest.mark.parametrize("per_image", [False, True])
def test_agrees_with_the_reference(dtype, channels, per_image):
    inputs = make_conv(channels, per_image=per_image, dtype=dtype)
    conv_agrees(run_cpp(inputs), inputs)


@settings(max_examples=60, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    visible=st.floats(0, 1),
    batch=st.integers(1, 4),
    per_image=st.booleans(),
    shuffled=st.booleans(),
    channels=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_shape_and_order(**fields):
    """Tokens numbered as an encoder likes, and few of them or all."""
    inputs = make_conv(**fields)
    conv_agrees(run_cpp(inputs), inputs)


def test_results_have_the_dtypes_of_what_they_are_of():
    inputs = make_conv(5, dtype=torch.bfloat16)
    inputs = dataclasses.replace(inputs, weight=inputs.weight.half(), bias=inputs.bias.double())
    found = run_cpp(inputs)
    assert found["out"].dtype == found["grad_x"].dtype == torch.bfloat16
    assert found["grad_weight"].dtype == torch.float16 and found["grad_bias"].dtype == torch.float64


def test_the_number_of_threads_changes_no_bit():
    inputs = make_conv(48, (20, 20), batch=8)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run_cpp(inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)))
def test_only_the_gradients_that_are_asked_for(needs):
    inputs = make_conv(5, batch=2, per_image=True, dtype=torch.bfloat16)
    arguments = (inputs.grad_out, inputs.x, inputs.weight, inputs.neighbours)
    backward = operator("sparse_depthwise_conv_backward")
    whole, some = backward(*arguments, True, True, True), backward(*arguments, *needs)
    for needed, found, expected in zip(needs, some, whole, strict=True):
        assert torch.equal(found, expected) if needed else found.numel() == 0
    torch.library.opcheck(backward, (*arguments, *needs))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_without_a_bias_without_tokens_and_strided(backend):
    inputs = make_conv(5, batch=2)
    x, weight, bias, neighbours = inputs.x, inputs.weight, inputs.bias, inputs.neighbours
    with gk.use_backend(backend):
        expected = gk.sparse_depthwise_conv(x, weight, bias, neighbours)
        assert torch.equal(
            gk.sparse_depthwise_conv(x, weight, None, neighbours),
            gk.sparse_depthwise_conv(x, weight, torch.zeros(5), neighbours),
        )
        strided = [t.repeat_interleave(2, -1)[..., ::2] for t in (x, weight, bias, neighbours)]
        assert torch.equal(gk.sparse_depthwise_conv(*strided), expected)
        for empty, some in ((x[:0], neighbours), (x[:, :0], neighbours[:, :0])):
            empty, learns = empty.clone().requires_grad_(), weight.clone().requires_grad_()
            gk.sparse_depthwise_conv(empty, learns, bias, some).sum().backward()
            assert empty.grad.shape == empty.shape and (learns.grad == 0).all()


def test_gradients_by_differences():
    inputs = make_conv(3, (3, 4), batch=2, per_image=True, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (inputs.x, inputs.weight, inputs.bias)]
    with gk.use_backend("cpp"):
        assert torch.autograd.gradcheck(
            lambda *leaves: gk.sparse_depthwise_conv(*leaves, inputs.neighbours), leaves
        )
        out = gk.sparse_depthwise_conv(*leaves, inputs.neighbours)
    (grad,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match='use_backend\\("reference"\\)'):
        grad.sum().backward()


def test_compiles_whole_and_under_autocast(monkeypatch):
    inputs = make_conv(8)
    expected = run_conv(inputs)
    torch._dynamo.reset()
    compiled = torch.compile(gk.sparse_depthwise_conv, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(gk, "sparse_depthwise_conv", compiled)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name, value in run_conv(inputs).items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_what_is_not_finite_reaches_neighbours_alone(backend):
    inputs = make_conv(4, (1, 9), batch=1, visible=1.0)
    with gk.use_backend(backend):
        clean = run_conv(inputs)
        inputs.x[0, 4] = torch.nan
        found = run_conv(inputs)
    near = [3, 4, 5]
    far = [token for token in range(9) if token not in near]
    assert found["out"][0, near].isnan().all()
    assert torch.equal(found["out"][0, far], clean["out"][0, far])
    assert torch.equal(found["grad_x"], clean["grad_x"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(9, 4)}, r"x must be floating point \[B, N, C\]"),
        ({"x": torch.zeros(2, 9, 4, dtype=torch.int32)}, "x must be floating point"),
        ({"weight": torch.zeros(4, 1, 5, 5)}, r"weight must be \[4, 1, 3, 3\] or \[4, 9\]"),
        ({"weight": torch.zeros(4, 9, dtype=torch.int8)}, "weight must be floating point"),
        ({"bias": torch.zeros(3)}, r"bias must be \[4\]"),
        ({"neighbours": torch.zeros(1, 8, 9, dtype=torch.int32)}, "make them with grid_neighb"),
        ({"neighbours": torch.zeros(1, 9, 9)}, "neighbours must be int32"),
        ({"neighbours": torch.zeros(3, 9, 9, dtype=torch.int32)}, "of 3 images and x a batch of 2"),
    ],
)
def test_clear_errors(change, message):
    inputs = dataclasses.replace(make_conv(4, (3, 3), batch=2, visible=1.0), **change)
    with pytest.raises(ValueError, match=message):
        gk.sparse_depthwise_conv(inputs.x, inputs.weight, inputs.bias, inputs.neighbours)


@pytest.mark.parametrize(
    ("visible", "error", "message"),
    [
        (np.ones((2, 2)), TypeError, "pass bool"),
        (np.ones(4, dtype=bool), ValueError, r"must be \[H, W\] or \[B, H, W\]"),
        (np.array([[[True, True]], [[True, False]]]), ValueError, "image 1 has 1 visible tokens"),
    ],
)
def test_clear_errors_of_grids(visible, error, message):
    with pytest.raises(error, match=message):
        gk.grid_neighbours(visible)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((0, 0, 0), 9, "neighbours name token 9"),
        ((1, 0, 0), 9, "neighbours name token 9"),
        ((0, 0, 0), 8, "which is not its neighbour"),
    ],
)
def test_the_kernel_refuses_neighbours_that_would_leave_its_memory_or_are_not_mutual(
    place, value, message
):
    inputs = make_conv(4, (3, 3), batch=2, visible=1.0, per_image=True)
    inputs.neighbours[place] = value
    with pytest.raises(RuntimeError, match=message):
        run_cpp(inputs)


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (0, lambda grad: grad[:, :-1], "grad_out must be like x"),
        (0, lambda grad: grad.double(), "grad_out must be like x"),
        (2, lambda weight: weight.t(), r"weight must be \[C, 9\]"),
        (2, lambda weight: weight.double(), r"weight must be \[C, 9\]"),
        (3, lambda neighbours: neighbours.long(), "int32"),
        (3, lambda neighbours: neighbours[..., :8], r"must be \[1 or B, N, 9\]"),
        (3, lambda neighbours: neighbours.repeat(3, 1, 1), "must be 1 or the batch size, 2, got 3"),
    ],
)
def test_the_kernel_refuses_what_does_not_fit(number, change, message):
    """It would read beyond their memory."""
    inputs = make_conv(4, (3, 3), batch=2, visible=1.0)
    arguments = [inputs.grad_out, inputs.x, inputs.weight, inputs.neighbours]
    arguments[number] = change(arguments[number])
    with pytest.raises(RuntimeError, match=message):
        operator("sparse_depthwise_conv_backward")(*arguments, True, True, True)
