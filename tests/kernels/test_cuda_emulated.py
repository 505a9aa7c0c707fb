"""The CUDA kernels' own source, run on the CPU: results against fp64, threads in several orders."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import pytest
import torch
from budget import plain_results
from conv_cases import conv_agrees, make_conv
from emulated import SMALL, Launch, convolve, copy_rows
from emulated import run as emulate
from hypothesis import given, settings
from hypothesis import strategies as st
from window_cases import (
    problems,
    scale_error,
    similar_keys,
    swin,
    volume,
    window_inputs,
)

import greenmim_kernels as gk
from greenmim_kernels import reference
from greenmim_kernels.testing import (
    Case,
    assert_within_budget,
    make_inputs,
    make_partition,
    relative_error,
    run,
)

pytestmark = pytest.mark.slow
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [
    Case(shifted=True, batch=3),
    Case(stage=2, head_dim=16, num_heads=3, batch=3),
    Case(stage=2, head_dim=64, per_image=True),
    Case(stage=3, shifted=True, num_heads=1),
    Case(stage=4, num_heads=2, batch=5),
    Case(image_size=(96, 64), window_size=5, shifted=True, mask_ratio=0.4, group_size=29),
    Case(image_size=(32, 32), stage=4, mask_ratio=0, head_dim=16, batch=1),
    Case(stage=2, window_size=7, group_size=48),
    Case(stage=2, window_size=14, shifted=True, head_dim=16, batch=3),
    Case(stage=2, window_size=14, group_size=150, head_dim=64, num_heads=1),
    Case(stage=1, window_size=14, image_size=(128, 160), per_image=True, num_heads=1),
    Case(image_size=(64, 64), window_size=16, mask_ratio=0, num_heads=1, batch=1),
    Case(image_size=(96, 96), window_size=24, mask_ratio=0, num_heads=1, head_dim=16, batch=1),
]
# With a mask per image blocks go over groups and heads: see test_cuda_over_heads.py.
OVER_HEADS = [
    Case(image_size=(96, 64), batch=3, per_image=True, shifted=True, num_heads=5, capacity=True),
    Case(image_size=(96, 64), batch=3, per_image=True, mask_ratio=0.0, num_heads=2),
]
ORDERS = (0, 1, 2026)  # ascending, descending, shuffled


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def exact_results(inputs):
    with gk.use_backend("reference"):
        return run(inputs.to(torch.float64))


def agree(actual, inputs, case=None, draw=None):
    """Within twice what the same formulas cost in plain PyTorch.

    Groups that fit into a block take delta from the probabilities, others from the output. With a
    case, or a function that draws by a seed, other values say what they cost, where these do not.
    """
    head_dim = inputs.qkv.shape[-1] // (3 * inputs.num_heads)
    saved_output = inputs.part.group_size > 64 or head_dim > 32

    def both(some):
        return plain_results(some, saved_output), exact_results(some)

    def other_draws():
        return [both(draw(seed)) for seed in range(100, 108)]

    if case is not None:
        draw = functools.partial(make_inputs, case)

    checked = {key: value for key, value in actual.items() if key != "lse"}
    assert_within_budget(checked, *both(inputs), other_draws=draw and other_draws)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_reference_in_any_order_of_threads(case, dtype):
    inputs = make_inputs(dataclasses.replace(case, dtype=dtype))
    first = emulate(inputs)
    agree(first, inputs)
    for order in ORDERS[1:]:
        for key, value in emulate(inputs, Launch(thread_order=order)).items():
            assert torch.equal(value, first[key]), f"{key} depends on the order of threads"


@settings(max_examples=40, deadline=None)
@given(
    units=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stage=st.integers(1, 4),
    window_size=st.integers(2, 9),
    shifted=st.booleans(),
    batch=st.integers(1, 4),
    num_heads=st.integers(1, 5),
    head_dim=st.sampled_from((16, 32, 64)),
    mask_ratio=st.sampled_from((0.0, 0.4, 0.75)),
    per_image=st.booleans(),
    extra_slots=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    processors=st.sampled_from((1, 3, 132)),
    seed=st.integers(0, 99),
)
def test_any_shape(units, extra_slots, processors, seed, **fields):
    case = Case(image_size=tuple(32 * n for n in units), **fields)
    fullest = make_partition(case, seed)
    fullest = int(torch.bincount(fullest.window_id[fullest.window_id >= 0].flatten()).max())
    if not case.per_image:  # beside odd sizes, the one that the cost model chooses
        case = dataclasses.replace(case, group_size=fullest + extra_slots)
    inputs = make_inputs(case, seed)
    agree(emulate(inputs, Launch(processors=processors)), inputs, case)


@settings(max_examples=60, deadline=None)
@given(
    problem=problems(),
    head_dim=st.sampled_from((4, 12, 16, 32, 48)),
    dtype=st.sampled_from(DTYPES),
    apart=st.booleans(),
    processors=st.sampled_from((1, 132)),
    order=st.sampled_from(ORDERS),
)
def test_windows_of_every_kind(problem, head_dim, dtype, apart, processors, order):
    draw = functools.partial(window_inputs, problem, dtype, head_dim, max(2, len(problem.index)))
    launch = Launch(apart=apart, processors=processors, thread_order=order)
    inputs = draw()
    agree(emulate(inputs, launch), inputs, draw=draw)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(
    ("problem", "head_dim"),
    [
        (swin(), 32),  # padding that attends, in one tile
        (swin((20, 9), (7, 7), (3, 3)), 16),
        (volume(), 8),  # in pieces, and rows that are no multiple of 16 bytes
        (volume((7, 7, 7), (7, 7, 7)), 32),
        (volume((2, 7, 7), (2, 7, 7), bias_index=torch.arange(98**2)), 4),  # a dense bias
    ],
    ids=["swin", "swin7", "volume", "cube", "dense"],
)
def test_padding_volumes_and_heads_of_any_width(problem, head_dim, apart, dtype):
    if "bias_index" in problem.arguments:
        problem = dataclasses.replace(
            problem, arguments={"bias_index": problem.arguments["bias_index"]},
            rows=torch.arange(98**2).view(1, 98, 98), table_rows=98**2,
        )  # fmt: skip
    inputs = window_inputs(problem, dtype, head_dim, batch=3)
    first = emulate(inputs, Launch(apart=apart))
    agree(first, inputs)
    for key, value in emulate(inputs, Launch(apart=apart, thread_order=2026)).items():
        assert torch.equal(value, first[key]), f"{key} depends on the order of threads"


def test_where_plain_arithmetic_was_lucky_other_values_say_what_it_costs():
    """Nine entries of a table, and a seed with a plain error of a third of the usual one."""
    case = Case(
        image_size=(32, 32), window_size=2, shifted=True, batch=3, num_heads=2, head_dim=64,
        mask_ratio=0.0, dtype=torch.bfloat16, group_size=4,
    )  # fmt: skip
    inputs = make_inputs(case, 28)
    actual = emulate(inputs, Launch(processors=1))
    with pytest.raises(AssertionError, match="grad_table"):
        agree(actual, inputs)
    agree(actual, inputs, case)
    actual["grad_table"] = actual["grad_table"].flip(0)  # still no excuse for what is wrong
    with pytest.raises(AssertionError, match="grad_table"):
        agree(actual, inputs, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[8]], ids=str)
def test_how_a_batch_is_cut_changes_no_bit_of_an_image(case, dtype):
    inputs = make_inputs(dataclasses.replace(case, dtype=dtype))
    together, apart = (emulate(inputs, Launch(processors=n)) for n in (1, 1000))
    for key in ("out", "lse", "grad_qkv"):
        assert torch.equal(together[key], apart[key]), key
    agree(apart, inputs)


def with_empty_groups(part, after):
    """The same groups and, after so many, 40 without a token: more than a warp has lanes."""

    def extended(x, padding):
        more = torch.full_like(x[:, :1], padding).expand(-1, 40, *x.shape[2:])
        return torch.cat([x[:, :after], more, x[:, after:]], 1)

    return dataclasses.replace(
        part,
        token_index=extended(part.token_index, -1),
        window_id=extended(part.window_id, -1),
        query_row=extended(part.query_row, 0),
        key_row=extended(part.key_row, 0),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[3], CASES[9]], ids=str)
def test_groups_without_a_token(case, dtype):
    """As in every partition with capacity; and wherever they are, should somebody make one."""
    inputs = make_inputs(dataclasses.replace(case, dtype=dtype))
    exact = emulate(inputs, Launch(processors=5))
    for after in (inputs.part.num_groups, 1):
        padded = dataclasses.replace(inputs, part=with_empty_groups(inputs.part, after))
        for order in ORDERS:
            actual = emulate(padded, Launch(processors=5, thread_order=order))
            for key in ("out", "lse", "grad_qkv"):
                assert torch.equal(actual[key], exact[key]), key
        agree(actual, inputs, case)
    if not case.per_image:  # groups at the end are none of the shares
        padded = dataclasses.replace(
            inputs, part=with_empty_groups(inputs.part, inputs.part.num_groups)
        )
        again = emulate(padded, Launch(processors=5))
        assert relative_error(again["grad_table"], exact["grad_table"]) < 1e-6


def test_a_large_scale_keeps_its_gradient_in_long_groups():
    """Rows of the scores' gradient add up to zero, though the output is rounded to 16 bits."""
    inputs = similar_keys(10, 112, torch.bfloat16)
    found = emulate(inputs, Launch(scale=100.0))
    assert scale_error(found["grad_qkv"], inputs, 100.0) < 0.2


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", [CASES[0], CASES[9]], ids=str)
def test_a_row_without_a_score_above_minus_infinity_is_nan(case, dtype):
    """It has no softmax, in the reference either; padding, which has none, stays out of it."""
    inputs = make_inputs(dataclasses.replace(case, dtype=dtype))
    token = int(inputs.part.token_index[0, 0, 0])
    inputs.qkv[0, token, 0] = -torch.inf
    inputs.qkv[0, :, case.channels] = 1
    with gk.use_backend("reference"):
        expected = run(inputs)
    actual = emulate(inputs)
    assert actual["out"][0, token, : case.head_dim].isnan().all()
    assert torch.equal(actual["out"].isnan(), expected["out"].isnan())
    # Gradients of its window show it, and none beyond its group.
    gradient, part = actual["grad_qkv"].isnan(), inputs.part
    window = part.token_index[part.window_id == part.window_id[0, 0, 0]].long()
    assert gradient[0, window, case.channels : case.channels + case.head_dim].all()
    assert not gradient[0, part.token_index[0, 1:][part.token_index[0, 1:] >= 0].long()].any()
    assert not gradient[1:].any()
    assert torch.equal(actual["grad_table"].isnan().any(0), expected["grad_table"].isnan().any(0))
    grouped = emulate(inputs, Launch(gathered=True))
    padding = (inputs.part.window_id[0] < 0).flatten()
    assert (grouped["out"][0, padding] == 0).all()


@pytest.mark.parametrize("per_image", [False, True], ids=["shared", "per-image"])
@pytest.mark.parametrize("window", [4, 14], ids=["short", "long"])
@pytest.mark.parametrize("bias", [torch.finfo(torch.float32).min, -1e9, -1e6])
def test_a_huge_negative_bias_of_all_keys_leaves_their_scores(bias, window, per_image):
    """A softmax does not see what its scores have in common; rounded, that was all there was."""
    case = Case(window_size=window, num_heads=1, per_image=per_image, dtype=torch.bfloat16)
    inputs = make_inputs(case)
    inputs.table.zero_()
    exact = emulate(inputs)
    inputs.table += bias
    actual = emulate(inputs)
    # Of the probabilities, 1e5 is off by what it is rounded by, forward and backward again.
    for result, most in (("out", 0.02), ("grad_qkv", 0.02)):
        assert relative_error(actual[result], exact[result]) < most
    assert actual["grad_table"].isfinite().all()


@pytest.mark.parametrize("per_image", [False, True])
def test_many_partial_sums_of_the_table(per_image):
    """128 programs and more: they are added in runs, and then these."""
    case = Case(stage=3, shifted=True, batch=64, num_heads=1, head_dim=16, per_image=per_image)
    inputs = make_inputs(case)
    assert inputs.part.num_groups * case.batch >= 128
    first = emulate(inputs, Launch(processors=1000))
    agree(first, inputs)
    for order in ORDERS[1:]:
        again = emulate(inputs, Launch(processors=1000, thread_order=order))
        assert torch.equal(again["grad_table"], first["grad_table"]), order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-9, 3.0])
def test_any_scale(scale, dtype):
    """Kernels of short groups divide the bias by it, where it is above zero."""
    inputs = make_inputs(Case(stage=2, num_heads=1, dtype=dtype))

    def attention(*arguments):
        return gk.group_window_attention(*arguments, scale=scale)

    with gk.use_backend("reference"):
        exact = run(inputs.to(torch.float64), attention)
    actual = emulate(inputs, Launch(scale=scale))
    for key, expected in exact.items():
        error = relative_error(actual[key], expected)
        assert error < 4 * torch.finfo(dtype).eps + 1e-5, key


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("head_dim", [16, 32, 64])
def test_little_shared_memory(head_dim, dtype):
    """Groups too long for four strips a block on a GPU with 99 KB of shared memory."""
    case = Case(image_size=(64, 64), window_size=16, mask_ratio=0, num_heads=1, batch=2,
                head_dim=head_dim, dtype=dtype)  # fmt: skip
    inputs = make_inputs(case)
    agree(emulate(inputs, Launch(shared_bytes=SMALL)), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[5], CASES[9], CASES[10]], ids=str)
def test_gathered_groups(case, dtype):
    fused, grouped = fused_and_gathered(make_inputs(dataclasses.replace(case, dtype=dtype)))
    assert torch.equal(grouped["grad_table"], fused["grad_table"])


def fused_and_gathered(inputs):
    """Padding is not read (it holds NaN) and written as zeros; the rest is the fused form's."""
    batch = len(inputs.qkv)
    fused, grouped = emulate(inputs), emulate(inputs, Launch(gathered=True))
    padding = (inputs.part.window_id < 0).flatten(1).expand(batch, -1)
    shape = (batch, inputs.part.num_groups, inputs.part.group_size, -1)
    with gk.use_backend("reference"):
        for key in ("out", "grad_qkv"):
            assert (grouped[key][padding] == 0).all(), key
            tokens = gk.group_scatter(grouped[key].view(shape), inputs.part)
            assert torch.equal(tokens, fused[key]), key
    assert (grouped["lse"].transpose(1, 2)[padding] == 0).all()
    return fused, grouped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("case", [CASES[0], CASES[9]], ids=str)
@pytest.mark.parametrize("poisoned", ["q", "k", "v", "grad_out"])
def test_padding_is_zero_beside_what_is_not_finite(case, dtype, poisoned):
    """Padding shares strips with tokens, and zero times infinity is NaN."""
    inputs = make_inputs(dataclasses.replace(case, dtype=dtype))
    part = inputs.part
    padding = part.window_id[0] < 0
    groups = padding.any(-1) & ~padding.all(-1)
    assert groups.any()
    last = (~padding).sum(-1, keepdim=True)[groups] - 1  # the token that padding follows
    last_tokens = part.token_index[0, groups].gather(1, last).flatten().long()
    if poisoned == "grad_out":
        inputs.grad_out[0, last_tokens] = torch.inf
    else:
        first = "qkv".index(poisoned) * case.channels
        inputs.qkv[0, last_tokens, first : first + case.channels] = torch.inf
    result = emulate(inputs, Launch(gathered=True))
    padding = padding.flatten()
    assert (result["out"][:, padding] == 0).all()
    assert (result["grad_qkv"][:, padding] == 0).all()
    assert (result["lse"][..., padding] == 0).all()
    assert not result["grad_qkv"].isfinite().all()


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("case", [CASES[0], CASES[9], *OVER_HEADS], ids=str)
def test_only_the_gradients_that_are_asked_for(case, apart):
    inputs = make_inputs(dataclasses.replace(case, dtype=torch.bfloat16))
    whole = emulate(inputs, Launch(apart=apart))
    for asked, other in (("need_qkv", "need_table"), ("need_table", "need_qkv")):
        part = emulate(inputs, Launch(apart=apart, **{other: False}))
        key = asked.replace("need", "grad")
        assert other.replace("need", "grad") not in part
        assert torch.equal(part[key], whole[key]), key


@pytest.mark.parametrize("case", [CASES[0], CASES[9], OVER_HEADS[0]], ids=str)
def test_without_a_table(case):
    inputs = make_inputs(dataclasses.replace(case, dtype=torch.float16))
    zeros = dataclasses.replace(inputs, table=torch.zeros_like(inputs.table))
    with_zeros, without = emulate(zeros), emulate(dataclasses.replace(inputs, table=None))
    for key in ("out", "lse", "grad_qkv"):
        assert torch.equal(without[key], with_zeros[key]), key
    assert "grad_table" not in without


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[9], CASES[10]], ids=str)
def test_lse(case):
    inputs = make_inputs(case)
    x = reference.group_gather(inputs.qkv.double(), inputs.part.token_index)
    q, k, _ = x.unflatten(-1, (3, case.num_heads, -1)).movedim(3, 0).transpose(-2, -3).unbind(0)
    same = inputs.part.window_id[..., :, None] == inputs.part.window_id[..., None, :]
    scores = q @ k.transpose(-1, -2) * case.head_dim**-0.5
    scores = scores + reference.relative_position_bias(
        inputs.table.double(), *inputs.part.tensors[1:]
    )
    lse = scores.masked_fill(~same[:, :, None], -torch.inf).logsumexp(-1)  # [B, G, heads, S]
    tokens = inputs.part.num_tokens
    exact = reference.group_scatter(lse.transpose(-1, -2), inputs.part.token_index, tokens)
    assert relative_error(emulate(inputs)["lse"].transpose(1, 2), exact) < 1e-6


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("more", [{}, {"group_size": 50}, {"capacity": True}], ids=str)
def test_what_is_not_finite_stays_in_its_group_and_shows(more, dtype, poison):
    """Of the first token, whose row is read where there is none."""
    case = Case(batch=1, num_heads=1, dtype=dtype, **more)
    inputs = make_inputs(case)
    holds = (inputs.part.token_index[0] == 0).any(1)
    (group,) = inputs.part.token_index[0, holds]
    members = group[group >= 0].long()
    clean = emulate(inputs)
    inputs.qkv[0, 0, [0, case.channels]] = poison  # its query and its key
    result = emulate(inputs)
    others = torch.ones(inputs.part.num_tokens, dtype=torch.bool)
    others[members] = False
    for key in ("out", "grad_qkv"):
        assert torch.equal(result[key][0, others], clean[key][0, others]), key
        assert not result[key][0, members].isfinite().all(), key
    assert not result["grad_table"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=name)
@pytest.mark.parametrize("channels", [1, 6, 16, 96, 250])
@pytest.mark.parametrize("per_image", [False, True])
def test_gather_and_scatter(channels, per_image, dtype):
    case = Case(image_size=(96, 64), batch=3, per_image=per_image, group_size=50)
    part = make_partition(case)
    x = torch.randn(3, part.num_tokens, channels).to(dtype)
    for order in ORDERS:
        groups = copy_rows(x, part, "gather", order)
        with gk.use_backend("reference"):
            assert torch.equal(groups, gk.group_gather(x, part).flatten(1, 2))
        assert torch.equal(copy_rows(groups, part, "scatter", order), x)


# --- the convolution of visible tokens ----------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
# Of one element, odd, whole pieces of 8 bytes that fill few lanes, a tile and a bit of the next.
@pytest.mark.parametrize("channels", [1, 7, 8, 96, 130, 132])
@pytest.mark.parametrize("per_image", [False, True])
def test_convolution_in_any_order_of_threads(channels, per_image, dtype):
    inputs = make_conv(channels, per_image=per_image, dtype=dtype, shuffled=True, batch=5)
    first = convolve(inputs)
    conv_agrees(first, inputs)
    for order in ORDERS[1:]:
        for key, value in convolve(inputs, order).items():
            assert torch.equal(value, first[key]), f"{key} depends on the order of threads"


@settings(max_examples=60, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    channels=st.integers(1, 150),
    batch=st.integers(1, 20),
    per_image=st.booleans(),
    visible=st.sampled_from((0.0, 0.3, 1.0)),
    has_bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    processors=st.sampled_from((1, 3, 132)),
    seed=st.integers(0, 99),
)
def test_convolution_of_any_shape(processors, **fields):
    inputs = make_conv(**fields)
    conv_agrees(convolve(inputs, processors=processors), inputs)


@pytest.mark.parametrize("per_image", [False, True])
def test_how_a_convolution_is_cut_changes_no_bit_of_an_image(per_image):
    """Into a block, and into so many that their sums are added in runs."""
    inputs = make_conv(132, (16, 16), batch=20, per_image=per_image, dtype=torch.bfloat16)
    together, apart = (convolve(inputs, processors=n) for n in (1, 1000))
    for key in ("out", "grad_x"):
        assert torch.equal(together[key], apart[key]), key
    assert not torch.equal(together["grad_weight"], apart["grad_weight"])  # it was cut
    conv_agrees(apart, inputs)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3))[1:-1])
def test_only_the_gradients_of_a_convolution_that_are_asked_for(needs):
    inputs = make_conv(20, dtype=torch.float16)
    whole, part = convolve(inputs), convolve(inputs, needs=needs)
    names = ("grad_x", "grad_weight", "grad_bias")
    assert set(part) == {"out", *(name for name, need in zip(names, needs, strict=True) if need)}
    for key, value in part.items():
        assert torch.equal(value, whole[key]), key


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("channels", [5, 8])
def test_what_is_not_finite_reaches_neighbours_alone(channels, dtype):
    """Hidden ones are zero, not a row that is not finite times zero."""
    inputs = make_conv(channels, per_image=True, dtype=dtype)
    clean = convolve(inputs)
    inputs.x[1, 0], inputs.grad_out[1, 0] = torch.nan, torch.inf
    result = convolve(inputs)
    beside = (inputs.neighbours[1] == 0).any(-1)
    assert not beside.all()
    for key in ("out", "grad_x"):
        assert not result[key][1, beside].isfinite().any(), key
        assert torch.equal(result[key][1, ~beside], clean[key][1, ~beside]), key
        assert torch.equal(result[key][[0, 2]], clean[key][[0, 2]]), key
    assert not result["grad_weight"].isfinite().all()
