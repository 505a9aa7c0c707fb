"""sparse_depthwise_conv: the reference against a dense convolution, the C++ kernel against it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import greenmim_kernels as gk
from greenmim_kernels.ops import operator
from greenmim_kernels.testing import assert_within_budget

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = ("x", "weight", "bias")


def grids(images: int, height: int, width: int, count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    flat = np.zeros((images, height * width), dtype=bool)
    for row in flat:
        row[rng.permutation(row.size)[:count]] = True
    return flat.reshape(images, height, width)


def draw(batch: int, tokens: int, channels: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """x, weight, bias and the gradient that comes back, of values that the dtype holds."""
    generator = torch.Generator().manual_seed(batch + tokens + channels)
    shapes = {"x": (batch, tokens, channels), "weight": (channels, 1, 3, 3), "bias": (channels,),
              "grad_out": (batch, tokens, channels)}  # fmt: skip
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


def run(values: dict[str, Tensor], neighbours: Tensor, conv=gk.sparse_depthwise_conv) -> dict:
    leaves = [values[name].clone().requires_grad_() for name in NAMES]
    out = conv(*leaves, neighbours)
    grads = torch.autograd.grad(out, leaves, values["grad_out"])
    names = [f"grad_{name}" for name in NAMES]
    return {"out": out.detach(), **dict(zip(names, grads, strict=True))}


def agree(values: dict[str, Tensor], neighbours: Tensor) -> dict:
    """The C++ kernel within the budget of the reference in the same dtype; its results."""
    dtype = values["x"].dtype
    plain = torch.float32 if dtype == torch.float64 else dtype
    with gk.use_backend("reference"):
        of_plain = run({n: x.to(plain) for n, x in values.items()}, neighbours)
        exact = run({n: x.double() for n, x in values.items()}, neighbours)
    with gk.use_backend("cpp"):
        actual = run(values, neighbours)
    assert all(x.dtype == dtype for x in actual.values())
    assert_within_budget(actual, of_plain, exact)
    return actual


@pytest.mark.parametrize("per_image", [False, True])
def test_the_reference_is_a_dense_convolution_with_zeros_for_what_is_hidden(per_image):
    visible = grids(3 if per_image else 1, 5, 7, 12)
    values = draw(3, 12, 4, torch.float64)
    on_map = torch.from_numpy(np.broadcast_to(visible, (3, 5, 7)).copy())

    def dense(x, weight, bias, neighbours):
        dense_map = x.new_zeros(3, 5, 7, 4).masked_scatter(on_map[..., None], x)
        out = F.conv2d(dense_map.permute(0, 3, 1, 2), weight, bias, padding=1, groups=4)
        return out.permute(0, 2, 3, 1)[on_map].view(3, 12, 4)

    neighbours = gk.grid_neighbours(visible if per_image else visible[0])
    assert neighbours.shape == (3 if per_image else 1, 12, 9)
    expected = run(values, neighbours, dense)
    with gk.use_backend("reference"):
        for name, value in run(values, neighbours).items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-12)


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
    visible = grids(3 if per_image else 1, 9, 8, 40)
    neighbours = gk.grid_neighbours(visible if per_image else visible[0])
    agree(draw(3, 40, channels, dtype), neighbours)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    share=st.floats(0, 1),
    batch=st.integers(1, 4),
    per_image=st.booleans(),
    channels=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_shape_and_order(height, width, share, batch, per_image, channels, dtype, seed):
    """Tokens numbered as an encoder likes, and few of them or all."""
    count = max(1, int(share * height * width))
    neighbours = gk.grid_neighbours(grids(batch if per_image else 1, height, width, count, seed))
    if not per_image:
        neighbours = neighbours[:1]
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
    number = order.argsort().int()
    neighbours = torch.where(neighbours < 0, -1, number[neighbours.long()])[:, order]
    agree(draw(batch, count, channels, dtype), neighbours)


def test_the_number_of_threads_changes_no_bit():
    neighbours = gk.grid_neighbours(grids(1, 20, 20, 200))
    values = draw(8, 200, 48, torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with gk.use_backend("cpp"):
                results.append(run(values, neighbours))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)))
def test_only_the_gradients_that_are_asked_for(needs):
    neighbours = gk.grid_neighbours(grids(2, 4, 4, 9))
    values = draw(2, 9, 5, torch.float32)
    x, grad_out, weight = values["x"], values["grad_out"], values["weight"].flatten(1)
    backward = operator("sparse_depthwise_conv_backward")
    whole = backward(grad_out, x, weight, neighbours, True, True, True)
    some = backward(grad_out, x, weight, neighbours, *needs)
    for needed, found, expected in zip(needs, some, whole, strict=True):
        assert torch.equal(found, expected) if needed else found.numel() == 0
    torch.library.opcheck(backward, (grad_out, x, weight, neighbours, *needs))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_without_a_bias_without_tokens_and_strided(backend):
    neighbours = gk.grid_neighbours(grids(1, 4, 4, 9))
    values = draw(2, 9, 5, torch.float32)
    x, weight, bias = (values[name] for name in NAMES)
    with gk.use_backend(backend):
        expected = gk.sparse_depthwise_conv(x, weight, bias, neighbours)
        assert torch.equal(
            gk.sparse_depthwise_conv(x, weight, None, neighbours),
            gk.sparse_depthwise_conv(x, weight, torch.zeros(5), neighbours),
        )
        strided = [t.repeat_interleave(2, -1)[..., ::2] for t in (x, weight, bias, neighbours)]
        assert torch.equal(gk.sparse_depthwise_conv(*strided), expected)
        empty = x[:0].requires_grad_()
        weight = weight.requires_grad_()
        gk.sparse_depthwise_conv(empty, weight, bias, neighbours).sum().backward()
    assert empty.grad.shape == empty.shape and (weight.grad == 0).all()


def test_gradients_by_differences():
    neighbours = gk.grid_neighbours(grids(2, 3, 4, 7))
    leaves = [draw(2, 7, 3, torch.float64)[name].requires_grad_() for name in NAMES]
    with gk.use_backend("cpp"):
        assert torch.autograd.gradcheck(
            lambda *leaves: gk.sparse_depthwise_conv(*leaves, neighbours), leaves
        )
        out = gk.sparse_depthwise_conv(*leaves, neighbours)
    (grad,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match='use_backend\\("reference"\\)'):
        grad.sum().backward()


def test_compiles_whole_and_under_autocast():
    neighbours = gk.grid_neighbours(grids(1, 6, 6, 20))
    values = draw(2, 20, 8, torch.float32)
    expected = run(values, neighbours)
    torch._dynamo.reset()
    compiled = torch.compile(gk.sparse_depthwise_conv, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name, value in run(values, neighbours, compiled).items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_what_is_not_finite_reaches_neighbours_alone(backend):
    neighbours = gk.grid_neighbours(np.ones((1, 9), dtype=bool))
    values = draw(1, 9, 4, torch.float32)
    with gk.use_backend(backend):
        clean = run(values, neighbours)
        values["x"][0, 4] = torch.nan
        found = run(values, neighbours)
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
    values = {**draw(2, 9, 4, torch.float32), "neighbours": gk.grid_neighbours(grids(1, 4, 4, 9))}
    values = {**values, **change}
    with pytest.raises(ValueError, match=message):
        gk.sparse_depthwise_conv(*(values[name] for name in (*NAMES, "neighbours")))


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
    [((0, 0, 0), 9, "neighbours name token 9"), ((0, 0, 8), 0, "which is not its neighbour")],
)
def test_the_kernel_refuses_neighbours_that_would_leave_its_memory_or_are_not_mutual(
    place, value, message
):
    neighbours = gk.grid_neighbours(grids(1, 4, 4, 9))
    neighbours[place] = value
    values = draw(2, 9, 4, torch.float32)
    with gk.use_backend("cpp"), pytest.raises(RuntimeError, match=message):
        run(values, neighbours)


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (0, lambda grad: grad[:, :-1], "grad_out must be like x"),
        (0, lambda grad: grad.double(), "grad_out must be like x"),
        (2, lambda weight: weight.t(), r"weight must be \[C, 9\]"),
        (2, lambda weight: weight.double(), r"weight must be \[C, 9\]"),
        (3, lambda neighbours: neighbours.long(), "int32"),
        (3, lambda neighbours: neighbours[..., :8], r"must be \[1 or B, N, 9\]"),
        (3, lambda neighbours: neighbours.repeat(3, 1, 1), "3 partitions for a batch of 2"),
    ],
)
def test_the_kernel_refuses_what_does_not_fit(number, change, message):
    """It would read beyond their memory."""
    values = draw(2, 9, 4, torch.float32)
    neighbours = gk.grid_neighbours(grids(1, 4, 4, 9))
    arguments = [values["grad_out"], values["x"], values["weight"].flatten(1), neighbours]
    arguments[number] = change(arguments[number])
    with pytest.raises(RuntimeError, match=message):
        operator("sparse_depthwise_conv_backward")(*arguments, True, True, True)
