"""The operators' Triton implementations: allocate, choose a kernel, launch.

Same arguments and results as the schemas in `greenmim_kernels.ops`. Everything that depends on the
data stays on the device: no call here waits for it.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import triton
from torch import Tensor

from ..partition import TENSORS
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
    precision_of,
    tile_of,
)
from .primitives import Partition
from .table_gradient import add_rows

LOG2_E = math.log2(math.e)


def _copy(x: Tensor, token_index: Tensor, num_tokens: int, out: Tensor, scatter: bool) -> Tensor:
    if out.numel() == 0 or x.numel() == 0:
        return out
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


@dataclasses.dataclass
class _Problem:
    """The shapes of one call and the arguments that all its kernels share."""

    qkv: Tensor
    table: Tensor | None
    token_index: Tensor | None  # None: qkv holds gathered groups
    window_id: Tensor
    query_row: Tensor
    key_row: Tensor
    num_heads: int
    scale: float
    backward: bool = False

    def __post_init__(self) -> None:
        for name in ("qkv", "table", *TENSORS):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value.contiguous())
        self.head_dim = self.qkv.shape[-1] // (3 * self.num_heads)
        self.partitions, self.num_groups, self.num_slots = self.window_id.shape
        if self.head_dim not in HEAD_DIMS:
            raise ValueError(f"the triton backend takes head dims {HEAD_DIMS}, got {self.head_dim}")
        self.batch = len(self.qkv)
        self.part = Partition(*(getattr(self, name) for name in TENSORS))
        self.num_rows = (
            self.num_groups * self.num_slots if self.token_index is None else self.qkv.shape[1]
        )
        # Offsets within an image, and within a partition, are in 32 bits.
        slots = self.partitions * self.num_groups * self.num_slots
        if max(self.num_rows * self.qkv.shape[-1], slots) >= 2**31:
            raise ValueError("the triton backend takes images of fewer than 2^31 values of q, k, v")
        self.table_rows = 0 if self.table is None else len(self.table)
        largest = 64
        if self.backward:
            largest = LARGEST_BACKWARD_TILE[precision_of(self.qkv.dtype)][self.head_dim]
        self.tile = tile_of(self.num_slots, largest)
        self.empty = self.batch * self.num_groups * self.num_slots * self.num_rows == 0

    def launch(self, kernel: str, pairs: bool = False, **more) -> tuple[tuple, tuple, dict]:
        """Grid, sizes and constants of a kernel, by its name in the launch table.

        `pairs` asks for a program per pair of blocks.
        """
        device = self.qkv.device
        name = class_name(kernel, self.tile, self.head_dim, self.qkv.dtype)
        launch = launch_table(architecture_of(device))[name]
        blocks = working = triton.cdiv(self.num_slots, launch.block)
        if pairs:
            # Slots are sorted by window: few blocks but neighbours share one.
            blocks, working = blocks**2, 3 * blocks - 2
        images = 1
        if self.partitions == 1:
            # Groups that a capacity leaves over are empty, and their programs end at once. How many
            # hold tokens stands on the device.
            filled = self.num_groups
            if self.token_index is not None:
                filled = expected_filled(filled, self.num_rows, self.num_slots)
            images = images_per_program(
                self.batch,
                self.num_heads * filled * working,
                launch.resident * num_processors(device),
            )
        chunks = triton.cdiv(self.batch, images)
        # Runs of images are part of the first axis: the others end at 65535.
        grid = (self.num_heads * self.num_groups * chunks, blocks)
        constants = {
            "NUM_HEADS": self.num_heads,
            "HEAD_DIM": self.head_dim,
            "BLOCK": launch.block,
            "GATHERED": self.token_index is None,
            "PER_IMAGE": self.partitions > 1,
            "PRECISION": "ieee",
            "num_warps": launch.warps,
            "num_stages": launch.stages,
        }
        sizes = (self.batch, self.num_rows, self.num_groups, self.num_slots, images)
        return grid, sizes, {**constants, **more}


def _forward(problem: _Problem) -> tuple[Tensor, Tensor]:
    qkv = problem.qkv
    out = qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)
    lse = qkv.new_empty(problem.batch, problem.num_heads, problem.num_rows, dtype=torch.float32)
    if problem.empty:
        return out, lse
    grid, sizes, constants = problem.launch("fwd", HAS_TABLE=problem.table is not None)
    kernel = group_attention_fwd_kernel if problem.tile else long.long_attention_fwd_kernel
    kernel[grid](
        problem.part, qkv, problem.table, out, lse, *sizes, problem.scale * LOG2_E, **constants
    )
    return out, lse


def _backward(
    problem: _Problem,
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    need_qkv: bool,
    need_table: bool,
) -> tuple[Tensor, Tensor]:
    qkv, table, part = problem.qkv, problem.table, problem.part
    grad_out, out, lse = grad_out.contiguous(), out.contiguous(), lse.contiguous()
    has_table = table is not None
    need_table = need_table and has_table
    grad_qkv = torch.empty_like(qkv) if need_qkv else qkv.new_empty(0)
    if problem.empty or not (need_qkv or need_table):
        shape = (problem.table_rows, problem.num_heads) if need_table else (0,)
        return grad_qkv, lse.new_zeros(shape)
    partial, powers = None, None
    scales = (problem.scale, problem.scale * LOG2_E)
    if problem.tile:
        grid, sizes, constants = problem.launch("bwd", HAS_TABLE=has_table)
        if need_table:
            partial, powers = _table_sums(problem, grid)
        group_attention_bwd_kernel[grid](
            part, grad_out, qkv, table, lse, grad_qkv, partial, powers, *sizes, *scales,
            TABLE_ROWS=problem.table_rows, NEED_QKV=need_qkv, NEED_TABLE=need_table, **constants,
        )  # fmt: skip
    elif need_qkv:
        for name, kernel in (
            ("bwd_query", long.long_attention_bwd_query_kernel),
            ("bwd_key", long.long_attention_bwd_key_kernel),
        ):
            grid, sizes, constants = problem.launch(name, HAS_TABLE=has_table)
            kernel[grid](
                part, grad_out, qkv, table, out, lse, grad_qkv, *sizes, *scales, **constants
            )
    if need_table and not problem.tile:
        grid, sizes, constants = problem.launch("bwd_table", pairs=True)
        partial, powers = _table_sums(problem, grid)
        long.long_attention_bwd_table_kernel[grid](
            part, grad_out, qkv, table, out, lse, partial, powers, *sizes, scales[1],
            TABLE_ROWS=problem.table_rows, **constants,
        )  # fmt: skip
    return grad_qkv, add_rows(partial, powers) if need_table else lse.new_empty(0)


def _table_sums(problem: _Problem, grid: tuple) -> tuple[Tensor, Tensor]:
    """Room for the integer sums of every program, and for the powers of two they are in."""
    shape = (problem.num_heads, math.prod(grid) // problem.num_heads)
    return (
        problem.qkv.new_empty(*shape, problem.table_rows, dtype=torch.int64),
        problem.qkv.new_empty(shape, dtype=torch.float32),
    )


def group_window_attention(
    qkv, table, token_index, window_id, query_row, key_row, num_heads, scale
) -> tuple[Tensor, Tensor]:
    return _forward(
        _Problem(qkv, table, token_index, window_id, query_row, key_row, num_heads, scale)
    )


def group_window_attention_backward(
    grad_out, qkv, table, out, lse, token_index, window_id, query_row, key_row, num_heads, scale,
    need_qkv, need_table,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    problem = _Problem(
        qkv, table, token_index, window_id, query_row, key_row, num_heads, scale, backward=True
    )
    return _backward(problem, grad_out, out, lse, need_qkv, need_table)


def block_diagonal_attention(
    qkv, table, window_id, query_row, key_row, num_heads, scale
) -> tuple[Tensor, Tensor]:
    return _forward(_Problem(qkv, table, None, window_id, query_row, key_row, num_heads, scale))


def block_diagonal_attention_backward(
    grad_out, qkv, table, out, lse, window_id, query_row, key_row, num_heads, scale, need_qkv,
    need_table,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    problem = _Problem(
        qkv, table, None, window_id, query_row, key_row, num_heads, scale, backward=True
    )
    return _backward(problem, grad_out, out, lse, need_qkv, need_table)
