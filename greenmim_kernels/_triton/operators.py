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

from . import long_groups as long
from .group_gather import copy_rows_kernel
from .group_window_attention import group_attention_bwd_kernel, group_attention_fwd_kernel
from .launch import (
    HEAD_DIMS,
    LARGEST_BACKWARD_TILE,
    class_name,
    images_per_program,
    launch_table,
    precision_of,
    tile_of,
)

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
    coords: Tensor
    num_heads: int
    window_height: int
    window_width: int
    scale: float
    backward: bool = False

    def __post_init__(self) -> None:
        for name in ("qkv", "table", "token_index", "window_id", "coords"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value.contiguous())
        self.head_dim = self.qkv.shape[-1] // (3 * self.num_heads)
        self.partitions, self.num_groups, self.num_slots = self.window_id.shape
        if self.head_dim not in HEAD_DIMS:
            raise ValueError(f"the triton backend takes head dims {HEAD_DIMS}, got {self.head_dim}")
        self.batch = len(self.qkv)
        self.num_rows = (
            self.num_groups * self.num_slots if self.token_index is None else self.qkv.shape[1]
        )
        self.table_rows = (2 * self.window_height - 1) * (2 * self.window_width - 1)
        largest = 64
        if self.backward:
            largest = LARGEST_BACKWARD_TILE[precision_of(self.qkv.dtype)][self.head_dim]
        self.tile = tile_of(self.num_slots, largest)
        self.empty = self.batch * self.num_groups * self.num_slots * self.num_rows == 0

    def launch(self, kernel: str, pairs: bool = False, **more):
        """A function that launches a kernel of this problem, its grid, and its images per program.

        `kernel` names it in the launch table; `pairs` asks for a program per pair of blocks.
        """
        launch = launch_table()[class_name(kernel, self.tile, self.head_dim, self.qkv.dtype)]
        blocks = triton.cdiv(self.num_slots, launch.block)
        blocks = blocks * blocks if pairs else blocks
        heads_groups = self.num_heads * self.num_groups
        images = 1
        if self.partitions == 1:
            images = images_per_program(launch, heads_groups * blocks, self.batch, self.qkv.device)
        chunks = triton.cdiv(self.batch, images)
        # Runs of images are part of the first axis: the others end at 65535.
        grid = (heads_groups * chunks, blocks)
        constants = {
            "NUM_HEADS": self.num_heads,
            "HEAD_DIM": self.head_dim,
            "COORD_WIDTH": 2 * self.window_width - 1,
            "OFFSET": (self.window_height - 1) * (2 * self.window_width - 1)
            + self.window_width
            - 1,
            "BLOCK": launch.block,
            "GATHERED": self.token_index is None,
            "PER_IMAGE": self.partitions > 1,
            "PRECISION": "ieee",
            "num_warps": launch.warps,
            "num_stages": launch.stages,
        }
        return grid, images, {**constants, **more}

    def inputs(self) -> tuple:
        """Pointers that every attention kernel starts with; what is absent is never read."""
        absent = self.window_id
        return (
            self.qkv,
            absent if self.table is None else self.table,
            absent if self.token_index is None else self.token_index,
            self.window_id,
            self.coords,
        )

    def sizes(self, images: int) -> tuple[int, ...]:
        return self.batch, self.num_rows, self.num_groups, self.num_slots, images


def _forward(problem: _Problem) -> tuple[Tensor, Tensor]:
    qkv = problem.qkv
    out = qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)
    lse = qkv.new_empty(problem.batch, problem.num_heads, problem.num_rows, dtype=torch.float32)
    if problem.empty:
        return out, lse
    grid, images, constants = problem.launch("fwd", HAS_TABLE=problem.table is not None)
    kernel = group_attention_fwd_kernel if problem.tile else long.long_attention_fwd_kernel
    kernel[grid](
        *problem.inputs(), out, lse, *problem.sizes(images), problem.scale * LOG2_E, **constants
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
    qkv = problem.qkv
    grad_out, out, lse = grad_out.contiguous(), out.contiguous(), lse.contiguous()
    has_table = problem.table is not None
    need_table = need_table and has_table
    grad_qkv = torch.empty_like(qkv) if need_qkv else qkv.new_empty(0)
    if problem.empty or not (need_qkv or need_table):
        shape = (problem.table_rows, problem.num_heads) if need_table else (0,)
        return grad_qkv, lse.new_zeros(shape)
    scales = (problem.scale, problem.scale * LOG2_E)
    if problem.tile:
        grid, images, constants = problem.launch("bwd", HAS_TABLE=has_table)
        partial, powers = _table_sums(problem, grid, need_table)
        group_attention_bwd_kernel[grid](
            grad_out, *problem.inputs(), lse, grad_qkv, partial, powers, *problem.sizes(images),
            *scales, TABLE_ROWS=problem.table_rows, NEED_QKV=need_qkv, NEED_TABLE=need_table,
            **constants,
        )  # fmt: skip
        return grad_qkv, _reduce(partial, powers)
    if need_qkv:
        for name, kernel in (
            ("bwd_query", long.long_attention_bwd_query_kernel),
            ("bwd_key", long.long_attention_bwd_key_kernel),
        ):
            grid, images, constants = problem.launch(name, HAS_TABLE=has_table)
            kernel[grid](
                grad_out, *problem.inputs(), out, lse, grad_qkv, *problem.sizes(images), *scales,
                **constants,
            )  # fmt: skip
    grid, images, constants = problem.launch("bwd_table", pairs=True)
    partial, powers = _table_sums(problem, grid, need_table)
    if need_table:
        long.long_attention_bwd_table_kernel[grid](
            grad_out, *problem.inputs(), out, lse, partial, powers, *problem.sizes(images),
            scales[1], TABLE_ROWS=problem.table_rows, **constants,
        )  # fmt: skip
    return grad_qkv, _reduce(partial, powers)


def _table_sums(problem: _Problem, grid: tuple, need_table: bool) -> tuple[Tensor, Tensor]:
    """Integer sums of every program, and the powers of two they are in. Zeros: some stop early."""
    programs = math.prod(grid) // problem.num_heads if need_table else 0
    rows, heads = problem.table_rows, problem.num_heads
    device = problem.qkv.device
    return (
        torch.zeros(heads, programs, rows, dtype=torch.int64, device=device),
        torch.zeros(heads, programs, dtype=torch.float32, device=device),
    )


def _reduce(partial: Tensor, powers: Tensor) -> Tensor:
    """Sum over programs in a fixed order -> [rows, heads], or empty where nothing was asked."""
    if partial.shape[1] == 0:
        return powers.new_empty(0)
    sums = (partial.double() * powers.double()[..., None]).sum(1)  # [heads, rows]
    return sums.t().float().contiguous()


def group_window_attention(
    qkv, table, token_index, window_id, coords, num_heads, window_height, window_width, scale
) -> tuple[Tensor, Tensor]:
    return _forward(
        _Problem(qkv, table, token_index, window_id, coords, num_heads, window_height,
                 window_width, scale)
    )  # fmt: skip


def group_window_attention_backward(
    grad_out, qkv, table, out, lse, token_index, window_id, coords, num_heads, window_height,
    window_width, scale, need_qkv, need_table,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    problem = _Problem(qkv, table, token_index, window_id, coords, num_heads, window_height,
                       window_width, scale, backward=True)  # fmt: skip
    return _backward(problem, grad_out, out, lse, need_qkv, need_table)


def block_diagonal_attention(
    qkv, table, window_id, coords, num_heads, window_height, window_width, scale
) -> tuple[Tensor, Tensor]:
    return _forward(
        _Problem(qkv, table, None, window_id, coords, num_heads, window_height, window_width,
                 scale)
    )  # fmt: skip


def block_diagonal_attention_backward(
    grad_out, qkv, table, out, lse, window_id, coords, num_heads, window_height, window_width,
    scale, need_qkv, need_table,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    problem = _Problem(qkv, table, None, window_id, coords, num_heads, window_height, window_width,
                       scale, backward=True)  # fmt: skip
    return _backward(problem, grad_out, out, lse, need_qkv, need_table)
