"""Windows as the caller cuts them: `partition_from_windows`, padding that attends, scale, q, k, v.

The oracle works on the caller's windows [W, n] with dense masks and biases, in float64.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from window_cases import HEADS, Windows, problems, swin, volume

import greenmim_kernels as gk
from greenmim_kernels.ops import operator
from greenmim_kernels.testing import assert_within_budget, relative_error


def dense(problem: Windows, q, k, v, table, scale, pad_value) -> Tensor:
    """q, k, v [B, N, heads, D] -> [B, N, C], window by window of the caller."""
    batch, tokens, heads, head_dim = q.shape
    out = torch.zeros(batch, tokens + 1, heads, head_dim, dtype=q.dtype)
    for image in range(batch):
        index = problem.index[image % len(problem.index)]  # [W, n]
        used = torch.full_like(index, problem.pad, dtype=torch.bool) | (index >= 0)
        windows = []
        for x, pad in zip((q, k, v), pad_value.view(3, heads, head_dim), strict=True):
            rows = torch.cat([x[image], pad[None]])  # the last one is padding's
            windows.append(rows[torch.where(index >= 0, index, tokens)])  # [W, n, heads, D]
        scores = torch.einsum("wihd,wjhd->whij", *windows[:2]) * scale.view(-1, 1, 1)
        if table is not None:
            scores = scores + table[problem.rows].movedim(-1, 1)
        attends = problem.attends & used[:, None]
        scores = scores.masked_fill(~attends[:, None], -math.inf)
        weights = torch.where(attends.any(-1)[:, None, :, None], scores, 0).softmax(-1)
        result = torch.einsum("whij,wjhd->wihd", weights, windows[2])
        out[image] = out[image].index_put((torch.where(index >= 0, index, tokens),), result)
        out[image, tokens] = 0
    return out[:, :tokens].flatten(2)


def results(
    problem: Windows, attention, dtype=torch.float64, head_dim=4, batch=None, seed=0, **named
):
    """Output and all gradients for random inputs, which `dtype` holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    batch = batch or len(problem.index)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    leaves = {name: draw(batch, problem.tokens, HEADS, head_dim) for name in "qkv"}
    leaves["scale"] = draw(HEADS)
    leaves["pad_value"] = draw(3 * HEADS * head_dim)
    if problem.table_rows:
        leaves["table"] = draw(problem.table_rows, HEADS)
    out = attention(problem, **{"table": None, **leaves})
    grad_out = draw(*out.shape).detach()
    used = [name for name in leaves if problem.pad or name != "pad_value"]
    grads = torch.autograd.grad(out, [leaves[name] for name in used], grad_out, **named)
    return {"out": out.detach(), **dict(zip(used, grads, strict=True))}


def ours(problem: Windows, q, k, v, table, scale, pad_value) -> Tensor:
    pad_value = pad_value if problem.pad else None
    part = problem.partition()
    return gk.group_window_attention((q, k, v), table, part, HEADS, scale, pad_value)


def agree(problem: Windows, backend: str, dtype=torch.float64, **sizes) -> None:
    exact = results(problem, lambda *a, **x: dense(*a, **{k: wide(v) for k, v in x.items()}),
                    dtype, **sizes)  # fmt: skip
    with gk.use_backend(backend):
        actual = results(problem, ours, dtype, **sizes)
    for name, value in actual.items():
        eps = torch.finfo(dtype).eps
        # The scale's gradient is a sum over q's, whose terms may nearly cancel.
        sums = name == "scale" and dtype == torch.float64
        terms = exact["q"].abs().sum().item() if sums else 1.0
        error = relative_error(value, exact[name], max(terms, 1.0))
        assert error < 60 * eps, f"{name}: {error:.1e}"


def wide(x):
    return x.double() if isinstance(x, Tensor) else x


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", ["reference", "cpp"])
@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_windows_of_every_kind(backend, problem):
    agree(problem, backend)


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("head_dim", [4, 7, 32])
def test_swin_on_a_grid_that_its_window_does_not_divide(head_dim, pad, dtype):
    agree(swin(pad=pad), "cpp", dtype, head_dim=head_dim, batch=3)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize(
    ("grid", "window"), [((4, 7, 10), (4, 7, 7)), ((11, 12), (11, 12)), ((130,), (65,))]
)
def test_windows_with_more_queries_than_are_taken_at_once(window, grid, pad, dtype):
    """Lines of 7, 12 and 65 keys; one query is left over of 65; images that share the windows."""
    problem = volume(grid, window)
    problem.pad = pad
    agree(problem, "cpp", dtype, head_dim=8, batch=2)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_windows_give_the_same_bits_for_any_number_of_threads(threads):
    problem, before = volume((24, 12), (12, 12)), torch.get_num_threads()
    expected = results(problem, ours, torch.float32, batch=3)
    torch.set_num_threads(threads)
    try:
        found = results(problem, ours, torch.float32, batch=3)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_nan_stays_in_its_large_window():
    part = volume((22, 10), (11, 10)).partition()
    x = torch.randn(1, 220, 3 * HEADS * 8)
    x[0, 5] = torch.nan
    out = gk.group_window_attention(x, None, part, HEADS)
    assert out[0, :110].isnan().all() and not out[0, 110:].isnan().any()


def numbers(query_row, key_row, rows: int) -> Tensor:
    """The gradient of a table whose rows are sums of such numbers; of a window of two tokens."""
    index, window = torch.tensor([[[0, 1]]]).int(), torch.zeros(1, 1, 2).int()
    pair = [torch.tensor([[row]], dtype=torch.int32) for row in (query_row, key_row)]
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, 2, 12, generator=generator, requires_grad=True)
    table = torch.randn(rows, 1, generator=generator, requires_grad=True)
    part = (index, window, *pair)
    out, _ = operator("group_window_attention")(qkv, None, None, table, None, *part, 1, 2, 0.5)
    return torch.autograd.grad(out.square().sum(), table)[0]


def test_numbers_of_any_size_whose_sums_are_rows():
    large = 2**31 - 2
    found = numbers([-large, 1 - large], [large + 1, large], 3)
    assert torch.equal(found, numbers([0, 1], [1, 0], 3))


def test_a_table_without_rows_is_refused():
    with pytest.raises(RuntimeError, match="with at least one row"):
        numbers([0, 1], [1, 0], 0)


def test_padding_is_worth_saying():
    """Reviewed: without it a network that pads is off by a tenth, and nothing tells."""
    with_padding, without = (results(swin(pad=pad), ours)["out"] for pad in (True, False))
    assert relative_error(without, with_padding) > 0.05


def test_tokens_in_no_window_are_zero():
    problem = Windows(torch.tensor([[[3, -1, 5], [8, 9, 1]]]), {}, torch.ones(2, 3, 3).bool(),
                      torch.zeros(2, 3, 3).long(), 0, 12)  # fmt: skip
    for backend in ("reference", "cpp"):
        with gk.use_backend(backend):
            found = results(problem, ours)
        outside = [0, 2, 4, 6, 7, 10, 11]
        assert (found["out"][:, outside] == 0).all()
        assert (found["out"][:, [3, 5]] != 0).any()
        for name in "qkv":
            assert (found[name][:, outside] == 0).all()


def test_a_value_of_padding_that_is_not_given_is_zero():
    problem = swin()

    def silent(problem, q, k, v, table, scale, pad_value):
        part = problem.partition()
        return gk.group_window_attention((q, k, v), table, part, HEADS, scale) + 0 * pad_value.sum()

    def zeros(problem, pad_value, **rest):
        return ours(problem, **rest, pad_value=0 * pad_value)

    for backend in ("reference", "cpp"):
        with gk.use_backend(backend):
            expected, found = results(problem, zeros), results(problem, silent)
        for name in found:
            assert relative_error(found[name], expected[name], 1.0) < 1e-12, name


def layouts(x: Tensor) -> list[Tensor]:
    """x [B, N, heads, D] in memory in different ways."""
    wide = torch.zeros(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype)
    wide[..., :-3] = x
    return [
        x.transpose(1, 2).contiguous().transpose(1, 2),
        x.transpose(0, 1).contiguous().transpose(0, 1),
        wide[..., :-3],
        x.transpose(1, 3).contiguous().transpose(1, 3),  # the elements of a head are not neighbours
    ]


@pytest.mark.parametrize("number", range(4))
def test_three_tensors_of_any_strides(number):
    part = swin().partition()
    x = torch.randn(2, part.num_tokens, 3, HEADS, 8, generator=torch.Generator().manual_seed(0))
    packed = x.flatten(2).requires_grad_()
    expected = gk.group_window_attention(packed, None, part, HEADS)
    grad_out = torch.randn(expected.shape)
    (grad,) = torch.autograd.grad(expected, packed, grad_out)
    three = [y.detach().requires_grad_()
             for y in layouts(x.unbind(2)[0])[number : number + 1]]  # fmt: skip
    three += [y.clone().requires_grad_() for y in x.unbind(2)[1:]]
    out = gk.group_window_attention(tuple(three), None, part, HEADS)
    assert torch.equal(out, expected)
    grads = torch.autograd.grad(out, three, grad_out)
    for found, wanted in zip(grads, grad.unflatten(-1, (3, HEADS, 8)).unbind(2), strict=True):
        assert torch.equal(found, wanted)
    if number < 2:
        assert grads[0].stride() == three[0].stride()


def test_views_of_a_packed_tensor_are_read_in_place(monkeypatch):
    part = swin().partition()
    x = torch.randn(2, part.num_tokens, 3 * HEADS * 8)
    three = x.unflatten(-1, (3, HEADS, 8)).unbind(2)

    def refuse(*_):
        raise AssertionError("a copy")

    expected = gk.group_window_attention(x, None, part, HEADS)
    monkeypatch.setattr(Tensor, "contiguous", refuse)
    assert torch.equal(gk.group_window_attention(three, None, part, HEADS), expected)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_scales(backend):
    """A number, a tensor [] and one per head; packed and not; the gradient of either tensor."""
    problem = swin()
    part = problem.partition()
    x = torch.randn(1, part.num_tokens, 3 * HEADS * 4, dtype=torch.float64)
    table = torch.randn(part.table_rows, HEADS, dtype=torch.float64)
    with gk.use_backend(backend):
        expected = gk.group_window_attention(x, table, part, HEADS, 0.7)
        for scale in (torch.tensor(0.7), torch.tensor([0.7, 0.7]), np.float64(0.7)):
            out = gk.group_window_attention(x, table, part, HEADS, scale)
            assert relative_error(out, expected) < 1e-7
        leaf = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

        def attention(scale):
            return gk.group_window_attention(x, table, part, HEADS, scale)

        assert torch.autograd.gradcheck(attention, leaf)
        leaf = torch.tensor([0.7, 1.3], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(attention, leaf)
    with pytest.raises(ValueError, match=r"\[\] or \[2\], got \[3\]"):
        gk.group_window_attention(x, table, part, HEADS, torch.ones(3))


def cosine(attention, change=lambda x: x):
    """SwinV2's attention at a logit scale of 100, the largest that it has."""

    def call(problem, q, k, v, scale, **rest):
        q, k, v, scale = map(change, (q, k, v, scale))
        rest = {name: change(x) for name, x in rest.items()}
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
        return attention(problem, q=q, k=k, v=v, scale=100 + 0 * scale, **rest)

    return call


def test_a_logit_scale_of_100_keeps_its_gradient():
    """Rows of the scores' gradient add up to zero; else 1e-4 of the gradient is lost in float32."""
    functions = cosine(ours), cosine(dense), cosine(dense, wide)
    sizes = {"dtype": torch.float32, "head_dim": 32}
    assert_within_budget(*(results(swin(), f, **sizes) for f in functions), factor=3)


def test_made_on_a_device_and_while_tracing_without_a_look_at_the_values():
    problem = swin()
    expected = problem.partition()
    problem = dataclasses.replace(problem, index=problem.index.to("meta"))
    part = problem.partition()
    assert part.token_index.device.type == "meta" and part.num_tokens == expected.num_tokens
    assert part.table_rows == expected.table_rows

    def step(index, mask, x):
        part = gk.partition_from_windows(index, (4, 4), mask=mask, pad=True, num_tokens=117)
        return gk.group_window_attention(x, None, part, HEADS)

    problem = swin()
    x = torch.randn(1, 117, 24)
    arguments = problem.index, problem.arguments["mask"], x
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = step(*arguments)
    assert relative_error(compiled(*arguments), expected) < 1e-6
    # Another mask is no reason to compile again.
    with torch.compiler.set_stance("fail_on_recompile"):
        mask = torch.zeros_like(problem.arguments["mask"])
        assert relative_error(compiled(problem.index, mask, x), step(problem.index, mask, x)) < 1e-6


def test_another_size_is_another_trace_and_no_error():
    """The second size makes sizes symbolic, as in a network whose images change."""

    def step(index, mask, x):
        part = gk.partition_from_windows(index, 4, mask=mask, num_tokens=x.shape[1])
        return gk.group_window_attention(x, None, part, HEADS)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for windows in (3, 5, 2, 7):
        index = torch.randperm(16 * windows).view(windows, 16)
        arguments = index, torch.zeros(windows, 16, 16), torch.randn(2, 16 * windows, 24)
        assert relative_error(compiled(*arguments), step(*arguments)) < 1e-6


@pytest.mark.parametrize("pad", [False, True])
def test_each_image_has_windows_labels_and_places_of_its_own(pad):
    generator = torch.Generator().manual_seed(0)
    window, images, windows = (3, 4), 3, 5
    index = torch.stack([torch.randperm(windows * 12, generator=generator) for _ in range(images)])
    index = torch.where(torch.rand(index.shape, generator=generator) < 0.2, -1, index)
    index = index.view(images, windows, 12)
    labels = torch.randint(0, 3, index.shape, generator=generator)
    order = torch.rand(index.shape, generator=generator).argsort(-1)
    places = torch.from_numpy(np.stack(np.unravel_index(order.numpy(), window), -1))
    fixed = {"pad": pad, "num_tokens": windows * 12}
    part = gk.partition_from_windows(index, window, segment=labels, coords=places, **fixed)
    x = torch.randn(images, windows * 12, 3 * HEADS * 4, dtype=torch.float64)
    table = torch.randn(part.table_rows, HEADS, dtype=torch.float64)
    out = gk.group_window_attention(x, table, part, HEADS)
    for i in range(images):
        alone = gk.partition_from_windows(
            index[i], window, segment=labels[i], coords=places[i], **fixed
        )
        expected = gk.group_window_attention(x[i : i + 1], table, alone, HEADS)
        assert relative_error(out[i : i + 1], expected) < 1e-12


@pytest.mark.parametrize("kind", [np.int16, np.int32, np.uint8, torch.int16, torch.int32])
def test_indices_of_any_integer_type(kind):
    expected = gk.partition_from_windows(INDEX, 2, coords=PLACES)
    if isinstance(kind, torch.dtype):
        found = gk.partition_from_windows(INDEX.to(kind), 2, coords=PLACES.to(kind))
    else:
        index = INDEX.numpy().astype(kind)[:, ::-1].copy()[:, ::-1]
        index.flags.writeable = False
        found = gk.partition_from_windows(index, (2, 2), coords=PLACES.numpy().astype(kind))
    assert all(map(torch.equal, found.tensors, expected.tensors))


def test_bool_masks_and_what_empty_slots_say():
    labels = torch.tensor([[0, 1, 0, 1], [2, 2, 2, 0]])
    attends = labels[:, :, None] == labels[:, None]
    expected = gk.partition_from_windows(INDEX, 2, segment=labels)
    found = gk.partition_from_windows(INDEX, 2, mask=~attends)
    x = torch.randn(1, 8, 24)
    outs = [gk.group_window_attention(x, None, part, HEADS) for part in (expected, found)]
    assert relative_error(*outs) < 1e-6
    # An empty slot that nobody attends to, itself included, and at a place far away.
    index, attends = INDEX.clone(), torch.ones(2, 4, 4, dtype=torch.bool)
    index[0, 2], attends[0, 2], attends[0, :, 2] = -1, False, False
    far = PLACES.repeat(2, 1, 1)
    far[0, 2] = 10**12
    part = gk.partition_from_windows(index, 2, mask=~attends, coords=far)
    expected = gk.partition_from_windows(index, 2)
    assert all(map(torch.equal, part.tensors, expected.tensors))
    # The token that no window holds is there, without a window.
    assert part.num_tokens == 8 and (part.token_index == 2).sum() == 1
    assert part.window_id[part.token_index == 2] == -1


@pytest.mark.parametrize("only", ["q", "k", "v", "table", "scale", "pad_value"])
def test_one_gradient_alone(only):
    problem = swin()

    def alone(problem, **leaves):
        others = {name: x.detach() for name, x in leaves.items() if name != only}
        return ours(problem, **{only: leaves[only]}, **others)

    expected = results(problem, ours)
    found = results(problem, alone, allow_unused=True)
    assert relative_error(found[only], expected[only]) < 1e-12
    assert {name for name, grad in found.items() if grad is not None} == {"out", only}


def test_overlapping_and_expanded_rows():
    part = gk.partition_from_windows(torch.arange(12).view(3, 4))
    base = torch.randn(2, 12 + 7, dtype=torch.float64)
    overlapping = base.unfold(1, 8, 1)[:, :, None]  # each row one element after the last one
    expanded = torch.randn(1, 12, 1, 8, dtype=torch.float64).expand(2, -1, -1, -1)
    for q, k in ((overlapping, expanded), (expanded, overlapping)):
        found = []
        for backend in ("reference", "cpp"):
            leaves = [x.detach().requires_grad_() for x in (q, k, q)]
            with gk.use_backend(backend):
                out = gk.group_window_attention(tuple(leaves), None, part, 1)
            found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for a, b in zip(*found, strict=True):
            assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("axes", [(1, 2), (0, 1)], ids=["channels first", "tokens first"])
def test_packed_in_another_layout_compiles(axes):
    part = gk.partition_from_windows(torch.arange(12).view(3, 4))
    x = torch.randn(2, 12, 24).transpose(*axes).contiguous().transpose(*axes).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(gk.group_window_attention, fullgraph=True)
    outs = [f(x, None, part, HEADS) for f in (compiled, gk.group_window_attention)]
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in outs]
    assert relative_error(*outs) < 1e-6 and relative_error(*grads) < 1e-6
    arguments = (x.detach(), None, None, None, None, *part.tensors, HEADS, 4, 0.5)
    torch.library.opcheck(operator("group_window_attention"), arguments)
    saved = operator("group_window_attention")(*arguments)
    arguments = (saved[0], *arguments[:5], *saved, *arguments[5:], True, False, False)
    torch.library.opcheck(operator("group_window_attention_backward"), arguments)


def test_float16_on_a_cpu_is_exact_at_its_ends():
    """Values pass unchanged through windows of one slot: all finite ones, infinities, NaN."""
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    part = gk.partition_from_windows(torch.arange(2**16).view(-1, 1))
    zeros = torch.zeros(1, 2**16, 1, 4, dtype=torch.float16)
    v = values.view(1, -1, 1, 1).expand(-1, -1, -1, 4).contiguous()
    with gk.use_backend("cpp"):
        out = gk.group_window_attention((zeros, zeros, v), None, part, 1)[0]
    number = ~values.isnan()
    for column in out.T:
        assert torch.equal(column.isnan(), ~number)
        assert torch.equal(column[number], values[number])


@pytest.mark.parametrize("head_dim", [3, 16])
def test_float16_rounds_as_pytorch_does(head_dim):
    """Sums of two values in float32: ties, subnormal and infinite results."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(1, 4000, 1, head_dim, generator=generator)
    v = (v * 2.0 ** torch.randint(-26, 17, v.shape, generator=generator)).half()
    part = gk.partition_from_windows(torch.arange(4000).view(-1, 2))
    zeros = torch.zeros_like(v)
    with gk.use_backend("cpp"):
        out = gk.group_window_attention((zeros, zeros, v), None, part, 1)
    pairs = v.float().view(2000, 2, head_dim)
    expected = (0.5 * pairs[:, 0] + 0.5 * pairs[:, 1]).half().repeat_interleave(2, 0)
    # Infinite with either sign is NaN.
    torch.testing.assert_close(out[0], expected, rtol=0, atol=0, equal_nan=True)


def test_agrees_with_the_planner_on_whole_windows():
    visible = np.ones((8, 12), bool)
    planned = gk.group_partition(visible, 4)
    index = torch.arange(96).view(2, 4, 3, 4).transpose(1, 2).reshape(6, 16)
    part = gk.partition_from_windows(index, 4)
    x, table = torch.randn(2, 96, 24), torch.randn(49, HEADS)
    expected = gk.group_window_attention(x, table, planned, HEADS)
    assert torch.equal(gk.group_window_attention(x, table, part, HEADS), expected)
    assert (part.table_rows, part.window_size) == (planned.table_rows, planned.window_size)


@pytest.mark.parametrize(
    ("slots", "size"), [(4, 16), (9, 27), (16, 16), (25, 25), (49, 49), (80, 80)]
)
def test_small_windows_share_a_group(slots, size):
    part = gk.partition_from_windows(torch.arange(10 * slots).view(10, slots))
    assert part.group_size == size


INDEX = torch.arange(8).view(2, 4)
PLACES = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
ASYMMETRIC = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
NO_SUM = torch.arange(16).view(4, 4) ** 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"token_index": INDEX.float()}, TypeError, "token_index has dtype torch.float32"),
        ({"token_index": INDEX[0]}, ValueError, r"token_index has shape \[4\]"),
        ({"token_index": INDEX[:0]}, ValueError, r"shape \[0, 4\]"),
        ({"token_index": INDEX - 2}, ValueError, "goes from -2 to 5"),
        ({"token_index": INDEX * 0 - 1}, ValueError, "names no token"),
        ({"token_index": INDEX % 7}, ValueError, "names token 0 of image 0 twice"),
        ({"num_tokens": 7}, ValueError, r"goes from 0 to 7; it must lie in \[0, 7\)"),
        ({"window_size": (1, 2)}, ValueError, "4 slots in a window of 1 x 2; pass coords"),
        ({"coords": INDEX}, ValueError, "coords need a window_size"),
        ({"window_size": 2, "coords": INDEX}, ValueError, r"coords has shape \[2, 4\]"),
        ({"window_size": 2, "coords": torch.zeros(4, 2).long()}, ValueError, "at one place"),
        ({"window_size": 2, "coords": 2 * INDEX.view(4, 2)}, ValueError, "differ by 12 on axis 0"),
        ({"window_size": 4, "coords": PLACES * 5}, ValueError, "differ by 5 on axis 0"),
        ({"window_size": 2, "coords": PLACES + 2**40}, ValueError, "too large"),
        ({"num_tokens": 0}, ValueError, r"num_tokens=0 must lie in \[1, "),
        ({"num_tokens": 8.0}, TypeError, "num_tokens=8.0 must be an integer"),
        ({"token_index": INDEX > 0}, TypeError, "token_index has dtype torch.bool"),
        (
            {"window_size": 2, "coords": INDEX, "bias_index": NO_SUM},
            ValueError,
            "coords and bias_index both",
        ),
        ({"bias_index": NO_SUM}, ValueError, "slots 1 and 1 in window 0 is 25, not 16 \\+ 1"),
        ({"bias_index": NO_SUM[:3]}, ValueError, r"bias_index has shape \[3, 4\]"),
        ({"bias_index": torch.zeros(4, 4).long()}, ValueError, "the same rows of the bias table"),
        ({"bias_index": torch.arange(16).view(4, 4) - 1}, ValueError, "goes from -1 to 14"),
        ({"bias_index": torch.arange(16.0)}, TypeError, "bias_index has dtype"),
        ({"window_size": 1, "bias_index": torch.arange(16)}, ValueError, "too far apart for the 1"),
        ({"segment": INDEX[:1]}, ValueError, r"segment has shape \[1, 4\]"),
        ({"segment": INDEX / 2}, TypeError, "segment has dtype"),
        ({"segment": INDEX, "mask": torch.zeros(2, 4, 4)}, ValueError, "segment and mask"),
        ({"mask": torch.zeros(4, 4)}, ValueError, r"mask has shape \[4, 4\]"),
        ({"mask": ASYMMETRIC[None].expand(2, -1, -1)}, ValueError, "does not cut windows into"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        gk.partition_from_windows(**{"token_index": INDEX, **arguments})


def test_errors_of_the_operator():
    part = gk.partition_from_windows(INDEX)
    x = torch.zeros(1, 8, 3 * HEADS * 4)
    three = x.unflatten(-1, (3, HEADS, 4)).unbind(2)
    for arguments, message in (
        ((x, torch.zeros(9, HEADS), part, HEADS), "has no bias table"),
        ((three[:2], None, part, HEADS), "or a tuple of three"),
        (((*three[:2], three[2][..., :3]), None, part, HEADS), "must all be"),
        (((*three[:2], three[2].double()), None, part, HEADS), "one dtype"),
        ((three, None, part, 3), r"must all be \[B, N, 3 heads"),
        ((tuple(y[:, 1:] for y in three), None, part, HEADS), "q has 7 tokens per image"),
        ((x, None, part, HEADS, None, x[0, 0, 1:]), r"pad_value must be \[24\]"),
    ):
        with pytest.raises(ValueError, match=message):
            gk.group_window_attention(*arguments)
