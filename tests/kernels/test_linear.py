"""The operators of linear layers on a CPU: products by oneDNN, and one backward pass."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import greenmim_kernels as gk
from greenmim_kernels.ops import operator

pytestmark = pytest.mark.skipif(
    gk.available_backends()["cpp"] is not None
    or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="no compiled kernels, or a PyTorch without oneDNN's linear layers",
)
ALL = (True, True, True)


def tensors(rows, inputs, outputs):
    generator = torch.Generator().manual_seed(rows + 31 * inputs + 977 * outputs)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    return normal(rows, outputs), normal(rows, inputs), normal(outputs, inputs)


def assert_within(actual, exact, magnitude, terms):
    """Rounding of a sum of so many terms, whatever its order, at most so large altogether."""
    error = (actual.double() - exact).abs()
    bound = (terms + 2) * torch.finfo(torch.float32).eps * magnitude
    assert (error <= bound).all(), f"{(error / bound.clamp(min=1e-300)).max():.1f} of the bound"


@hypothesis.settings(deadline=None, max_examples=80)
@hypothesis.given(
    rows=st.one_of(st.integers(0, 40), st.integers(250, 800)),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    strided=st.booleans(),
)
def test_gradients_are_the_exact_ones(rows, inputs, outputs, strided):
    grad, x, weight = tensors(rows, inputs, outputs)
    if strided:  # every second column of a wider one
        wide = torch.full((rows, 2 * outputs), float("nan"))
        wide[:, ::2] = grad
        grad = wide[:, ::2]
    g, y, w = grad.double(), x.double(), weight.double()
    results = operator("onednn_linear_backward")(grad, x, weight, *ALL)
    exact = (g @ w, g.t() @ y, g.sum(0))
    magnitudes = (g.abs() @ w.abs(), g.abs().t() @ y.abs(), g.abs().sum(0))
    for actual, value, magnitude, terms in zip(
        results, exact, magnitudes, (outputs, rows, rows), strict=True
    ):
        assert actual.shape == value.shape and actual.is_contiguous()
        assert_within(actual, value, magnitude, terms)


def test_the_bias_is_summed_in_blocks():
    """Long sums in float32 alone would be off by hundreds of ulps."""
    grad = torch.full((200_000, 17), 0.1)
    exact = grad.double().sum(0)
    (_, _, sums) = operator("onednn_linear_backward")(
        grad, torch.zeros(200_000, 1), torch.zeros(17, 1), False, False, True
    )
    assert ((sums - exact).abs() <= 4e-6 * exact).all()


def test_the_number_of_threads_does_not_change_the_bias():
    grad, x, weight = tensors(700, 40, 100)
    threads = torch.get_num_threads()
    sums = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            sums.append(operator("onednn_linear_backward")(grad, x, weight, False, False, True)[2])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck_forward(bias):
    _, x, weight = tensors(6, 5, 7)
    torch.library.opcheck(
        operator("onednn_linear"), (x.view(2, 3, 5), weight, torch.randn(7) if bias else None)
    )


@pytest.mark.parametrize("needed", [ALL, (True, False, False), (False, True, False),
                                    (False, False, True), (False, False, False)])  # fmt: skip
@pytest.mark.parametrize("rows", [6, 0])
def test_opcheck_backward(needed, rows):
    arguments = tensors(rows, 5, 7)
    torch.library.opcheck(operator("onednn_linear_backward"), (*arguments, *needed))
    results = operator("onednn_linear_backward")(*arguments, *needed)
    assert [bool(result.numel()) for result in results] == [
        need and (rows > 0 or number > 0) for number, need in enumerate(needed)
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"grad": torch.zeros(6, 8)}, "grad must be"),
        ({"grad": torch.zeros(5, 7)}, "as many rows"),
        ({"x": torch.zeros(6, 4)}, "x must be"),
        ({"x": torch.zeros(6, 5).double()}, "x must be float32"),
        ({"weight": torch.zeros(7)}, "weight must be"),
    ],
)
def test_what_does_not_fit_is_refused(change, said):
    grad, x, weight = tensors(6, 5, 7)
    arguments = {"grad": grad, "x": x, "weight": weight, **change}
    with pytest.raises(RuntimeError, match=said):
        operator("onednn_linear_backward")(*arguments.values(), *ALL)


def test_a_bias_may_have_strides_and_must_fit():
    _, x, weight = tensors(6, 5, 7)
    linear = operator("onednn_linear")
    for bias in (torch.randn(14)[::2], torch.randn(1).expand(7)):
        expected = torch.nn.functional.linear(x, weight, bias)
        torch.testing.assert_close(linear(x, weight, bias), expected)
    for bias in (torch.zeros(8), torch.zeros(()), torch.zeros(1, 7), torch.zeros(7).double()):
        with pytest.raises(RuntimeError, match="bias must be"):
            linear(x, weight, bias)
