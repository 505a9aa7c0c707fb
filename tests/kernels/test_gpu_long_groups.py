"""Triton's kernels for groups of more than 64 slots: the expanded bias, and bands."""

from __future__ import annotations

import dataclasses
import math
from itertools import product

import pytest
import torch
from kernel_backends import DEVICE, kernel_test
from window_cases import swin, window_inputs

pytest.importorskip("triton")

import triton
import triton.language as tl

import greenmim_kernels as gk
from greenmim_kernels._triton import operators
from greenmim_kernels._triton.launch import launch_table
from greenmim_kernels._triton.long_groups import reach_of
from greenmim_kernels.testing import Case, Inputs, make_inputs, relative_error, run

CASES = [
    Case(stage=2, window_size=14, shifted=True, batch=3, capacity=True),
    # Windows of 49 tokens in groups of which neither 16 nor 32 slots are a part.
    Case(stage=2, mask_ratio=0.3, num_heads=1, batch=1, group_size=201, shifted=True),
]


def results(inputs: Inputs, backend: str) -> dict[str, torch.Tensor]:
    """Of tokens as they lie, of gathered groups, and of q, k and v apart, where only k asks."""
    part, heads = inputs.part, inputs.num_heads
    with gk.use_backend(backend):
        found = run(inputs)
        groups, grad = gk.group_gather(inputs.qkv, part), gk.group_gather(inputs.grad_out, part)
        leaves = groups.requires_grad_(), inputs.table.detach().requires_grad_()
        out = gk.block_diagonal_attention(*leaves, part, heads)
        grads = torch.autograd.grad(out, leaves, grad)
        q, k, v = inputs.qkv.unflatten(-1, (3, heads, -1)).unbind(2)
        k = k.contiguous().requires_grad_()
        apart = gk.group_window_attention((q, k, v), inputs.table, part, heads)
        (grad_k,) = torch.autograd.grad(apart, k, inputs.grad_out)
    more = {"groups": out.detach(), "grad_groups": grads[0], "grad_groups_table": grads[1]}
    return found | more | {"apart": apart.detach(), "grad_k": grad_k}


@kernel_test
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_expanded_bias_is_the_tables(case, monkeypatch):
    """Looked up pair by pair, as where it would be too large, it gives the same results."""
    inputs = make_inputs(case, device=DEVICE)
    expected = results(inputs, "triton")
    monkeypatch.setattr(operators, "LARGEST_EXPANDED", 0)
    for name, value in results(inputs, "triton").items():
        assert relative_error(value, expected[name]) < 1e-6, name


@kernel_test
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_expanded_bias(case, gathered):
    """Every pair that shares a window, and minus infinity wherever else a tile may reach."""
    inputs = make_inputs(case, device=DEVICE)
    part = inputs.part
    index = None if gathered else part.token_index
    x = gk.group_gather(inputs.qkv, part) if gathered else inputs.qkv
    problem = operators._Problem(
        x, None, None, inputs.table, None, index, part.window_id, part.query_row, part.key_row,
        inputs.num_heads, part.window_slots, 1.0,
    )  # fmt: skip
    table, expanded = problem.bias()
    assert table is None and expanded is not None
    slots = part.group_size
    for block in (16, 32, 64):  # from the last place where a tile may start
        assert expanded.shape[2] >= (slots - 1) // 16 * 16 + block
    window, rows, keys = (x[0] for x in (part.window_id, part.query_row, part.key_row))
    shares = (window[:, :, None] == window[:, None, :]) & (window >= 0)[:, :, None]
    entry = torch.where(shares, rows[:, :, None] + keys[:, None, :], 0)
    bias = (inputs.table[entry] * math.log2(math.e)).masked_fill(~shares[..., None], -math.inf)
    found = expanded.permute(1, 2, 3, 0)
    torch.testing.assert_close(found[:, :slots, :slots], bias)
    assert (found[:, slots:] == -math.inf).all() and (found[:, :, slots:] == -math.inf).all()


@triton.jit
def reaches_kernel(p_reach, COUNT: tl.constexpr):
    o_size = tl.arange(0, COUNT)
    tl.store(p_reach + o_size, reach_of(o_size + 1))


@kernel_test
def test_the_host_and_the_kernels_agree_how_far_tiles_reach():
    found = torch.empty(1024, dtype=torch.int32, device=DEVICE)
    reaches_kernel[(1,)](found, 1024)
    assert found.tolist() == [operators.reach_of(size) for size in range(1, 1025)]


@kernel_test
def test_nothing_outside_of_a_band_is_read():
    """A token that is not finite reaches its own windows and what shares a block with these."""
    inputs = make_inputs(Case(stage=2, mask_ratio=0, num_heads=1, batch=1, group_size=201),
                         device=DEVICE)  # fmt: skip
    (window,) = inputs.part.window_id[:, 0].tolist()
    token = inputs.part.token_index[0, 0]
    far = torch.tensor([i for i, one in enumerate(window) if one >= window[0] + 3])
    assert window.count(window[0] + 3) > 32
    inputs.qkv[0, token[0]] = math.nan
    inputs.grad_out[0, token[0]] = math.nan
    with gk.use_backend("triton"):
        found = run(inputs.to(torch.float32))
    for name in ("out", "grad_qkv"):
        assert found[name][0, token[0]].isnan().any()
        assert found[name][0, token[far]].isfinite().all(), name


@pytest.fixture
def blocks(request, monkeypatch) -> None:
    """Blocks of the four kernels, in the places of those that the launch table has."""
    kernels = ("fwd", "bwd_query", "bwd_key", "bwd_table")
    table = dict(launch_table(90))
    for (kernel, block), head_dim in product(zip(kernels, request.param, strict=True), (16, 32)):
        name = f"{kernel}-long-{head_dim}-fp32"
        table[name] = dataclasses.replace(table[name], block=block)
    monkeypatch.setattr(operators, "launch_table", lambda _: table)


def assert_agrees(inputs: Inputs) -> None:
    with gk.use_backend("reference"):
        expected = run(inputs.to(torch.float64))
    with gk.use_backend("triton"):
        found = run(inputs)
    for name, value in expected.items():
        assert relative_error(found[name], value) < 1e-5, name


any_blocks = pytest.mark.parametrize(
    "blocks",
    [(32, 16, 64, 32), (16, 32, 16, 64)],
    ids=lambda blocks: "-".join(map(str, blocks)),
    indirect=True,
)


LONG = Case(image_size=(128, 128), stage=2, head_dim=16, mask_ratio=0.3, group_size=110)


@kernel_test
@pytest.mark.usefixtures("poisoned_memory", "blocks")
@any_blocks
@pytest.mark.parametrize(
    "case",
    [
        Case(stage=2, window_size=14, head_dim=16, group_size=250, num_heads=1, capacity=True),
        # Heads and groups, of one mask and of two.
        dataclasses.replace(LONG, shifted=True),
        dataclasses.replace(LONG, per_image=True, head_dim=30),
        # More slots than are looked at a time for a band.
        Case(image_size=(96, 128), mask_ratio=0.2, num_heads=1, head_dim=16, batch=1,
             window_size=9, group_size=600),
    ],
    ids=str,
)  # fmt: skip
def test_blocks_of_any_size(case):
    """Each kernel has its own, and reads no number of a slot that another has not written."""
    inputs = make_inputs(case, device=DEVICE)
    exact, found = results(inputs.to(torch.float64), "reference"), results(inputs, "triton")
    for name, value in exact.items():
        assert relative_error(found[name], value) < 1e-5, name


@kernel_test
@pytest.mark.usefixtures("poisoned_memory", "blocks")
@any_blocks
def test_blocks_of_nothing_but_padding():
    """Forty tokens of a window, and sixty slots of padding that attends."""
    inputs = window_inputs(swin((10, 4), (10, 10), (0, 0)), torch.float32, 16)
    tensors = ("qkv", "table", "grad_out", "part", "pad_value")
    moved = {name: getattr(inputs, name).to(DEVICE) for name in tensors}
    assert_agrees(dataclasses.replace(inputs, **moved))
