"""The operators of linear layers and MLPs on a CPU: products by oneDNN, and one backward pass."""

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
@hypothesis.example(rows=70, inputs=2, outputs=2100, strided=False)
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


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    rows=st.integers(0, 70),  # on both sides of the outputs: either factor may come first
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 70),
    bias=st.booleans(),
    strided=st.sampled_from(["nothing", "x", "weight"]),
)
def test_a_layer_is_the_exact_one(rows, inputs, outputs, bias, strided):
    _, x, weight = tensors(rows, inputs, outputs)
    added = torch.linspace(-1, 1, outputs) if bias else None
    if strided == "x":
        x = x.t().contiguous().t()
    if strided == "weight":
        weight = weight.t().contiguous().t()
    out = operator("onednn_linear")(x.unflatten(0, (1, rows)), weight, added)
    exact = torch.nn.functional.linear(x.double(), weight.double())
    size = x.double().abs() @ weight.double().abs().t()
    if bias:
        exact, size = exact + added.double(), size + added.double().abs()
    assert out.shape == (1, rows, outputs) and out.is_contiguous()
    assert_within(out[0], exact, size, inputs)


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


def gelu(x):
    """GELU's value and derivative, in float64."""
    root = 2**0.5
    below = 0.5 * torch.special.erfc(-x / root)
    return x * below, below + x * (-0.5 * x * x).exp() / (2 * torch.pi) ** 0.5


def test_gelu_and_its_derivative_are_within_their_budget():
    """What an MLP of one channel and a weight of 1 gives on the way."""
    line = torch.linspace(-14, 14, 100_003)
    x = torch.cat([line, torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e20, -1e20, 3e38, -3e38])])
    one = torch.ones(1, 1)
    _, value, slope = operator("onednn_mlp")(x[:, None], one, None, one, None)
    exact_value, exact_slope = gelu(x.double())
    # The formula's 7.5e-8 and a few roundings of F(x), which is at most 1, and of x f(x).
    unit = torch.finfo(torch.float32).eps / 2
    budget = 7.5e-8 + 4 * unit
    assert ((value[:, 0] - exact_value).abs() <= x.double().abs() * budget).all()
    assert ((slope[:, 0] - exact_slope).abs() <= budget + 8 * unit).all()


def test_gelu_of_what_is_no_number():
    x = torch.tensor([float("nan"), float("inf"), 1.0])
    one = torch.ones(1, 1)
    _, value, slope = operator("onednn_mlp")(x[:, None], one, None, one, None)
    assert value.isnan().flatten().tolist() == [True, False, False]
    assert value[1] == float("inf")
    assert slope.isnan().flatten().tolist() == [True, True, False]  # as PyTorch's


def mlp_tensors(rows, inputs, width, outputs, bias=True):
    generator = torch.Generator().manual_seed(rows + 31 * inputs + 977 * width + outputs)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    biases = (normal(width), normal(outputs)) if bias else (None, None)
    weights = normal(width, inputs) / inputs**0.5, normal(outputs, width)
    return normal(rows, outputs), normal(rows, inputs), weights[0], biases[0], weights[1], biases[1]


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    rows=st.one_of(st.integers(0, 40), st.integers(100, 300)),
    inputs=st.integers(1, 20),
    width=st.integers(1, 70),
    outputs=st.integers(1, 20),
    bias=st.booleans(),
)
@hypothesis.example(rows=70, inputs=2, width=2100, outputs=2, bias=True)  # sums in several parts
def test_an_mlp_and_its_gradients_are_the_exact_ones(rows, inputs, width, outputs, bias):
    grad, *tensors = mlp_tensors(rows, inputs, width, outputs, bias)
    out, hidden, slope = operator("onednn_mlp")(*tensors)
    x, weight1, _, weight2, _ = tensors
    needed = (True, True, bias, True, bias)
    grads = operator("onednn_mlp_backward")(grad, x, hidden, slope, weight1, weight2, *needed)

    leaves = [None if t is None else t.double().requires_grad_() for t in tensors]
    y, first, bias1, second, bias2 = leaves
    middle = torch.nn.functional.linear(y, first, bias1)
    value, _ = gelu(middle)
    exact = torch.nn.functional.linear(value, second, bias2)
    exact.backward(grad.double())

    # Of everything that is summed, the sizes: each rounding is of a part of those.
    middle, slopes = middle.detach(), gelu(middle.detach())[1]
    first_size = weight1.double().abs()
    size = (x.double().abs() @ first_size.t()) + (0 if bias1 is None else bias1.detach().abs())
    value_size = size * 1.13  # the slope of GELU is at most that, and so it passes errors on
    out_size = value_size @ weight2.double().abs().t()
    out_size += 0 if bias2 is None else bias2.detach().abs()
    grad_value_size = grad.double().abs() @ weight2.double().abs()
    # The derivative of the slope is below 0.8: what `middle` is off changes it.
    grad_middle_size = grad_value_size * (1.13 + 0.8 * size)
    assert slopes.abs().max() <= 1.13 if rows else True
    sizes = [
        grad_middle_size @ first_size,
        grad_middle_size.t() @ x.double().abs(),
        grad_middle_size.sum(0),
        grad.double().abs().t() @ value_size,
        grad.double().abs().sum(0),
    ]
    terms = inputs + width + outputs + rows + 8
    assert_within(out, exact.detach(), out_size, terms)
    for actual, leaf, most in zip(grads, leaves, sizes, strict=True):
        if leaf is None:
            assert actual.numel() == 0
        else:
            assert actual.shape == leaf.shape and actual.is_contiguous()
            assert_within(actual, leaf.grad, most, terms)


def test_an_mlp_has_the_same_bits_for_any_number_of_threads():
    grad, *tensors = mlp_tensors(300, 24, 100, 24)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            _, hidden, slope = operator("onednn_mlp")(*tensors)
            x, weight1, _, weight2, _ = tensors
            arguments = grad, x, hidden, slope, weight1, weight2
            needed = (False, False, True, False, True)
            found.append([hidden, slope, *operator("onednn_mlp_backward")(*arguments, *needed)])
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


NEEDED = [ALL + (True, True), (True,) + (False,) * 4, (False,) * 5] + [
    tuple(place == number for place in range(5)) for number in range(1, 5)
]


@pytest.mark.parametrize("rows", [6, 0])
@pytest.mark.parametrize("needed", NEEDED)
def test_opcheck_mlp(rows, needed):
    grad, *tensors = mlp_tensors(rows, 5, 7, 3)
    torch.library.opcheck(operator("onednn_mlp"), tuple(tensors))
    out, hidden, slope = operator("onednn_mlp")(*tensors)
    x, weight1, _, weight2, _ = tensors
    arguments = grad, x, hidden, slope, weight1, weight2
    before = [tensor.clone() for tensor in arguments]
    backward = operator("onednn_mlp_backward")
    torch.library.opcheck(backward, (*arguments, *needed))
    results, everything = backward(*arguments, *needed), backward(*arguments, *NEEDED[0])
    for result, one, need in zip(results, everything, needed, strict=True):
        assert torch.equal(result, one) if need else result.numel() == 0
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


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
        ({"grad": torch.zeros(5, 7)}, "must agree in all axes but the last"),
        ({"x": torch.zeros(6, 4)}, "x must be"),
        ({"x": torch.zeros(6, 5).double()}, "x must be float32"),
        ({"x": torch.zeros(3, 2, 5)}, "must agree in all axes but the last"),
        ({"weight": torch.zeros(7)}, "weight must be"),
        ({"weight": torch.zeros(7, 0)}, "must not be empty"),
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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"grad": torch.zeros(6, 4)}, "grad must be"),
        ({"grad": torch.zeros(5, 3)}, "grad and x must agree in all axes but the last"),
        ({"hidden": torch.zeros(6, 8)}, "hidden must be"),
        ({"slope": torch.zeros(5, 7)}, "slope and x must agree in all axes but the last"),
        ({"slope": torch.zeros(6, 7).double()}, "slope must be float32"),
        ({"weight2": torch.zeros(3, 8)}, "weight2 must be"),
    ],
)
def test_what_does_not_fit_an_mlp_is_refused(change, said):
    grad, x, weight1, _, weight2, _ = mlp_tensors(6, 5, 7, 3)
    arguments = {"grad": grad, "x": x, "hidden": torch.zeros(6, 7), "slope": torch.zeros(6, 7)}
    arguments |= {"weight1": weight1, "weight2": weight2, **change}
    with pytest.raises(RuntimeError, match=said):
        operator("onednn_mlp_backward")(*arguments.values(), *NEEDED[0])
