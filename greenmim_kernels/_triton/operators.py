"""The operators' Triton implementations: allocate, choose a kernel, launch.

Arguments and results are those of the schemas in `greenmim_kernels.ops`. Everything that depends
on the data stays on the device: no call here waits for it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import triton
from torch import Tensor

from ..partition import TENSORS
from ..reference import with_rows
from . import long_groups as long
from .group_gather import copy_rows_kernel
from .group_window_attention import group_attention_bwd_kernel, group_attention_fwd_kernel
from .launch import (
    HEAD_DIMS,
    LARGEST_BACKWARD_TILE,
    architecture_of,
    class_name,
    expected_filled,
    images_per_program,
    launch_table,
    num_processors,
    pairs_of,
    precision_of,
    tile_of,
)
from .primitives import Partition, Rows
from .sparse_depthwise_conv import conv_kernel, conv_sums_kernel
from .table_gradient import add_rows

LOG2_E = math.log2(math.e)
# The most elements of an expanded bias: 64 MiB. For many 3-D windows it would outgrow the inputs.
# Independent of the batch size, so that a short last batch uses the same kernels.
LARGEST_EXPANDED = 1 << 24


def _copy(x: Tensor, token_index: Tensor, num_tokens: int, out: Tensor, scatter: bool) -> Tensor:
    if out.numel() == 0:
        return out
    if x.numel() == 0:
        return out.zero_()
    num_slots, channels = token_index.shape[1] * token_index.shape[2], out.shape[-1]
    block_channels = min(triton.next_power_of_2(channels), 256)
    block_slots = max(1, 2048 // block_channels)
    copy_rows_kernel[(triton.cdiv(num_slots, block_slots) * len(x),)](
        x, out, token_index, num_slots, num_tokens, channels,
        BLOCK_SLOTS=block_slots, BLOCK_CHANNELS=block_channels, SCATTER=scatter,
        PER_IMAGE=len(token_index) > 1, num_warps=4,
    )  # fmt: skip
    return out


def group_gather(x: Tensor, token_index: Tensor) -> Tensor:
    out = x.new_empty(len(x), *token_index.shape[1:], x.shape[2])
    return _copy(x.contiguous(), token_index.contiguous(), x.shape[1], out, scatter=False)


def group_scatter(x: Tensor, token_index: Tensor, num_tokens: int) -> Tensor:
    out = x.new_empty(len(x), num_tokens, x.shape[3])
    return _copy(x.contiguous(), token_index.contiguous(), num_tokens, out, scatter=True)


def reach_of(num_slots: int) -> int:
    """`long_groups.reach_of`, on the host."""
    align = long.ALIGNMENT.value
    return (num_slots - 1) // align * align + long.LARGEST_TILE.value


@dataclasses.dataclass
class _Problem:
    """The shapes of one call and the arguments that all its kernels share."""

    q: Tensor
    k: Tensor | None  # None: q holds k and v too
    v: Tensor | None
    table: Tensor | None
    pad_value: Tensor | None
    token_index: Tensor | None  # None: q holds gathered groups
    window_id: Tensor
    query_row: Tensor
    key_row: Tensor
    num_heads: int
    window_slots: int
    scale: float
    backward: bool = False

    def __post_init__(self) -> None:
        packed = self.k is None
        if self.k is None or self.v is None:
            self.q = self.q.contiguous()
        else:
            self.q, self.k, self.v = map(with_rows, (self.q, self.k, self.v))
        for name in ("table", "pad_value", *TENSORS):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value.contiguous())
        self.channels = self.q.shape[-1] // 3 if packed else self.q.shape[-1] * self.num_heads
        self.head_dim = self.channels // self.num_heads
        if self.head_dim % 2 or self.head_dim > HEAD_DIMS[-1]:
            raise ValueError(
                f"the triton backend takes head dims that are multiples of 2 up to {HEAD_DIMS[-1]},"
                f" got {self.head_dim}; use another backend"
            )
        self.tile_dim = next(dim for dim in HEAD_DIMS if dim >= self.head_dim)
        self.partitions, self.num_groups, self.num_slots = self.window_id.shape
        self.batch = len(self.q)
        self.part = Partition(*(getattr(self, name) for name in TENSORS))
        grouped = self.token_index is None
        self.num_rows = self.num_groups * self.num_slots if grouped else self.q.shape[1]
        self.out_shape = (*self.q.shape[: 3 if grouped else 2], self.channels)
        self.qkv = self.rows_of((self.q, self.k, self.v))
        # Offsets within an image, and within the partitions of a batch, are in 32 bits.
        slots = self.partitions * self.num_groups * self.num_slots
        tensors = [x for x in (self.q, self.k, self.v) if x is not None]
        reach = max(self.num_rows * x.stride(-2 if packed else 1) for x in tensors)
        reach = max(reach, self.num_rows * self.channels)  # of the output
        self.table_rows = 0 if self.table is None else len(self.table)
        if max(reach, slots, self.table_rows * self.num_heads) >= 2**31:
            raise ValueError(
                "the triton backend takes images whose q, k, v and the output span fewer than 2**31"
                " values each, partitions of fewer than 2**31 slots in all and bias tables of fewer"
                " than 2**31 values; use another backend"
            )
        largest = 64
        if self.backward:
            largest = LARGEST_BACKWARD_TILE[precision_of(self.q.dtype)][self.tile_dim]
        self.tile = tile_of(self.num_slots, largest)
        self.empty = self.batch * self.num_groups * self.num_slots * self.num_rows == 0

    def rows_of(self, tensors: tuple) -> tuple[Rows, ...]:
        """q, k, v or their gradients, as kernels take them."""
        q, k, v = tensors
        if k is None:
            return (Rows(q, 0, 0, 0),) * 3
        return tuple(Rows(x, *x.stride()[:3]) for x in (q, k, v))

    def launch(self, kernel: str, pairs: bool = False, **more) -> tuple[tuple, tuple, dict]:
        """Grid, sizes and constants of a kernel, by its name in the launch table.

        pairs: one program per pair of blocks instead of per block.
        """
        device = self.q.device
        name = class_name(kernel, self.tile, self.tile_dim, self.q.dtype)
        launch = launch_table(architecture_of(device))[name]
        programs = working = 1 if self.tile else triton.cdiv(self.num_slots, launch.block)
        if pairs:
            programs, working = pairs_of(programs)
        images = 1
        if self.partitions == 1:
            # Groups that a capacity adds are empty, and their programs end at once. How many hold
            # tokens only the device knows, so it is estimated.
            filled = self.num_groups
            if self.token_index is not None:
                filled = expected_filled(filled, self.num_rows, self.num_slots)
            images = images_per_program(
                self.batch,
                self.num_heads * filled * working,
                launch.resident * num_processors(device),
            )
        grid = (self.num_heads * programs * self.num_groups * triton.cdiv(self.batch, images),)
        if grid[0] >= 2**31:
            raise ValueError(
                f"the triton backend runs fewer than 2**31 programs at once, not {grid[0]}; use"
                " another backend"
            )
        constants = {
            "NUM_HEADS": self.num_heads,
            "DIM": self.head_dim,
            "HEAD_DIM": self.tile_dim,
            "BLOCK": launch.block,
            "GATHERED": self.token_index is None,
            "PACKED": self.k is None,
            "PER_IMAGE": self.partitions > 1,
            "PRECISION": "ieee",
            "num_warps": launch.warps,
            "num_stages": launch.stages,
        }
        sizes = (self.batch, self.num_rows, self.num_groups, self.num_slots, images)
        return grid, sizes, {**constants, **more}

    def bias(self) -> tuple[Tensor | None, Tensor | None]:
        """(table, expanded bias) for kernels of long groups; at most one of them is not None."""
        reach = reach_of(self.num_slots)
        shape = (self.num_heads, self.num_groups, reach, reach)
        if self.table is None or self.partitions > 1 or math.prod(shape) > LARGEST_EXPANDED:
            return self.table, None
        expanded = self.table.new_empty(shape)
        queries, keys = 16, 128
        grid = (shape[0] * shape[1], triton.cdiv(reach, queries), triton.cdiv(reach, keys))
        long.expand_bias_kernel[grid](
            self.part, self.table, expanded, self.num_groups, self.num_slots,
            NUM_HEADS=self.num_heads, GATHERED=self.token_index is None, QUERIES=queries,
            KEYS=keys, num_warps=4,
        )  # fmt: skip
        return None, expanded


def _forward(problem: _Problem) -> tuple[Tensor, Tensor]:
    out = problem.q.new_empty(problem.out_shape)
    lse = out.new_empty(problem.batch, problem.num_heads, problem.num_rows, dtype=torch.float32)
    if problem.empty:
        return out, lse
    grid, sizes, constants = problem.launch("fwd")
    inputs = (problem.part, *problem.qkv, problem.pad_value)
    results = (out, lse, *sizes, problem.scale * LOG2_E)
    if problem.tile:
        group_attention_fwd_kernel[grid](
            *inputs, problem.table, *results, HAS_TABLE=problem.table is not None, **constants
        )
    else:
        long.long_attention_fwd_kernel[grid](*inputs, *problem.bias(), *results, **constants)
    return out, lse


def _backward(
    problem: _Problem,
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    need_qkv: bool,
    need_table: bool,
    need_pad: bool = False,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, the table and padding; empty where they are not asked for."""
    table, pad, part = problem.table, problem.pad_value, problem.part
    grad_out, out, lse = grad_out.contiguous(), out.contiguous(), lse.contiguous()
    has_table, nothing = table is not None, lse.new_empty(0)
    need_table, need_pad = need_table and has_table, need_pad and pad is not None
    # The gradients of padding are summed from those of k and v.
    computes = need_qkv or need_pad
    tensors = (problem.q, problem.k, problem.v)
    grads = [torch.empty_like(x) if computes and x is not None else None for x in tensors]
    grad_table, grad_pad = nothing, nothing
    if problem.empty or not (computes or need_table):
        grad_table = lse.new_zeros((problem.table_rows, problem.num_heads) if need_table else (0,))
        pad_shape = (2 * problem.head_dim, problem.num_heads)
        grad_pad = lse.new_zeros(pad_shape if need_pad else (0,))
    else:
        grad_rows = problem.rows_of(tuple(grads)) if computes else (None,) * 3
        scales = (problem.scale, problem.scale * LOG2_E)
        absent: tuple[Any, Any, Any] = (None, None, None)
        partial, powers, pad_sums = absent
        inputs = (part, grad_out, *problem.qkv, pad)
        if problem.tile:
            grid, sizes, constants = problem.launch("bwd", HAS_TABLE=has_table)
            if need_table:
                partial, powers = _table_sums(problem, grid)
            if need_pad:
                pad_sums = _pad_sums(problem, grid)
            group_attention_bwd_kernel[grid](
                *inputs, table, lse, *grad_rows, partial, powers, pad_sums, *sizes, *scales,
                TABLE_ROWS=problem.table_rows, NEED_QKV=computes, NEED_TABLE=need_table,
                **constants,
            )  # fmt: skip
        else:
            inputs = (*inputs, *problem.bias())
            shape = (problem.batch, problem.num_heads, problem.num_groups, problem.num_slots)
            slot_numbers = lse.new_empty(shape), lse.new_empty(shape)
            # Launched even if grad_q is not needed: the other kernels read its `slot_numbers`.
            grid, sizes, constants = problem.launch("bwd_query", NEED_QKV=computes)
            long.long_attention_bwd_query_kernel[grid](
                *inputs, out, lse, *slot_numbers, grad_rows[0], *sizes, *scales, **constants
            )
            if computes:
                grid, sizes, constants = problem.launch("bwd_key")
                if need_pad:
                    pad_sums = _pad_sums(problem, grid)
                long.long_attention_bwd_key_kernel[grid](
                    *inputs, *slot_numbers, *grad_rows[1:], pad_sums, *sizes, *scales, **constants
                )
            if need_table:
                grid, sizes, constants = problem.launch("bwd_table", pairs=True)
                partial, powers = _table_sums(problem, grid)
                long.long_attention_bwd_table_kernel[grid](
                    *inputs, *slot_numbers, partial, powers, *sizes, scales[1],
                    TABLE_ROWS=problem.table_rows, **constants,
                )  # fmt: skip
        if need_table:
            grad_table = add_rows(partial, powers)
        if need_pad:
            grad_pad = pad_sums.sum(1, dtype=torch.float64).t().float().contiguous()
    own = (x if need_qkv and x is not None else problem.q.new_empty(0) for x in grads)
    return *own, grad_table, grad_pad


def _programs(problem: _Problem, grid: tuple) -> tuple[int, int]:
    """(heads, programs per head)."""
    return problem.num_heads, math.prod(grid) // problem.num_heads


def _table_sums(problem: _Problem, grid: tuple) -> tuple[Tensor, Tensor]:
    """Buffers for every program's integer sums, and for the powers of two that scale them."""
    shape = _programs(problem, grid)
    return (
        problem.q.new_empty(*shape, problem.table_rows, dtype=torch.int64),
        problem.q.new_empty(shape, dtype=torch.float32),
    )


def _pad_sums(problem: _Problem, grid: tuple) -> Tensor:
    """A buffer for every program's sums of the gradients of the padding's k and v."""
    shape = (*_programs(problem, grid), 2 * problem.head_dim)
    return problem.q.new_empty(shape, dtype=torch.float32)


def group_window_attention(*arguments) -> tuple[Tensor, Tensor]:
    return _forward(_Problem(*arguments))


def group_window_attention_backward(
    grad_out, q, k, v, table, pad_value, out, lse, *arguments
) -> tuple[Tensor, ...]:
    sizes = (*arguments[:-3], True)
    problem = _Problem(q, k, v, table, pad_value, *sizes)
    return _backward(problem, grad_out, out, lse, *arguments[-3:])


def block_diagonal_attention(qkv, table, *arguments) -> tuple[Tensor, Tensor]:
    return _forward(_Problem(qkv, None, None, table, None, None, *arguments))


def block_diagonal_attention_backward(
    grad_out, qkv, table, out, lse, *arguments
) -> tuple[Tensor, Tensor]:
    sizes = (*arguments[:-2], True)
    problem = _Problem(qkv, None, None, table, None, None, *sizes)
    grad_qkv, _, _, grad_table, _ = _backward(problem, grad_out, out, lse, *arguments[-2:])
    return grad_qkv, grad_table


# For the sums of the convolution's weights: a program's tile, and programs per multiprocessor.
CONV_TOKENS, CONV_CHANNELS, CONV_PROGRAMS = 2, 64, 8


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor, flip: bool):
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    batch, tokens, channels = x.shape
    block_channels = min(triton.next_power_of_2(channels), 128)
    block_tokens = 1024 // block_channels
    conv_kernel[(triton.cdiv(tokens, block_tokens) * batch,)](
        x, out, weight.contiguous(), None if bias is None else bias.contiguous(),
        neighbours.contiguous(), tokens, channels, BLOCK_TOKENS=block_tokens,
        BLOCK_CHANNELS=block_channels, FLIP=flip, PER_IMAGE=len(neighbours) > 1, num_warps=4,
    )  # fmt: skip
    return out


def sparse_depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor
) -> Tensor:
    return _convolve(x, weight, bias, neighbours, flip=False)


def sparse_depthwise_conv_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    neighbours: Tensor,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, sums = x.new_empty(0), weight.new_zeros(10, x.shape[2])
    if need_x:
        grad_x = _convolve(grad_out, weight, None, neighbours, flip=True)
    if x.numel() and (need_weight or need_bias):
        sums = _conv_sums(x.contiguous(), grad_out.contiguous(), neighbours.contiguous())
    return (
        grad_x,
        sums[:9].t().contiguous() if need_weight else weight.new_empty(0),
        sums[9].clone() if need_bias else weight.new_empty(0),
    )


def _conv_sums(x: Tensor, grad_out: Tensor, neighbours: Tensor) -> Tensor:
    """Gradients of a channel's nine weights, then of its bias, [10, C]."""
    batch, tokens, channels = x.shape
    tiles = triton.cdiv(channels, CONV_CHANNELS)
    all_blocks = triton.cdiv(batch * tokens, CONV_TOKENS)
    programs = triton.cdiv(CONV_PROGRAMS * num_processors(x.device), tiles)
    blocks = triton.cdiv(all_blocks, programs)
    programs = triton.cdiv(all_blocks, blocks)
    partial = x.new_empty(programs, 10, channels, dtype=torch.float32)
    conv_sums_kernel[programs, tiles](
        x, grad_out, neighbours, partial, batch * tokens, tokens, channels, blocks,
        BLOCK_TOKENS=CONV_TOKENS, BLOCK_CHANNELS=CONV_CHANNELS, PER_IMAGE=len(neighbours) > 1,
        num_warps=4,
    )  # fmt: skip
    return partial.sum(0, dtype=torch.float64).float()
