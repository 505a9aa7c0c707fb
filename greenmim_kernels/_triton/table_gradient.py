"""The bias table's gradient, with the same bits every time.

Many pairs of a tile share an entry, and float atomics would add them in any order. So a program
scales its tile by a power of two to 41-bit integers, whose sum is exact in any order, and adds them
into a row of its own. The rows are then added in float64, in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs whose rows are added by one program; more of them take a second pass.
RUN = 512
BLOCK_PROGRAMS = 64
BLOCK_ROWS = 16


@triton.jit
def clear_row(p_partial, program, TABLE_ROWS: tl.constexpr):
    """Zero this program's row; `add_to_table` has the barrier that orders it before the atomics."""
    p_row = p_partial + program.to(tl.int64) * TABLE_ROWS
    for first in tl.static_range(0, TABLE_ROWS, 256):
        o_row = first + tl.arange(0, 256)
        tl.store(p_row + o_row, tl.zeros([256], tl.int64), mask=o_row < TABLE_ROWS)


@triton.jit
def add_to_table(p_partial, p_power, program, b_grad, b_entry, m_pair, TABLE_ROWS: tl.constexpr):
    """Add a tile of the bias' gradient to this program's own row, which `clear_row` has cleared.

    `p_power` receives the row's scale, a power of two, or NaN if the tile is not finite. Pairs
    outside m_pair are zero, or non-finite next to a non-finite token.
    """
    largest = tl.max(tl.max(tl.abs(b_grad), 1), 0)
    # max may drop a NaN; a sum keeps it.
    total = tl.sum(tl.sum(b_grad * 0.0, 1), 0)
    exponent = ((largest.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    exponent = tl.maximum(exponent, -80)
    up = ((40 - exponent + 127) << 23).to(tl.float32, bitcast=True)
    down = ((exponent - 40 + 127) << 23).to(tl.float32, bitcast=True)
    finite = total == 0.0
    fixed = tl.where(finite, b_grad * up, 0.0).to(tl.int64)
    tl.debug_barrier()
    p_row = p_partial + program.to(tl.int64) * TABLE_ROWS
    tl.atomic_add(p_row + b_entry, fixed, mask=m_pair, sem="relaxed")
    tl.store(p_power + program, tl.where(finite, down, float("nan")))


@triton.jit(do_not_specialize=["programs", "run"])
def add_rows_kernel(
    p_from,  # int64 [heads, programs, TABLE_ROWS], or float64 without powers
    p_power,  # fp32 [heads, programs]; where it is 0, nothing was written to the row
    p_to,  # fp32 [TABLE_ROWS, heads], or float64 [heads, runs, TABLE_ROWS]
    programs,
    run,  # programs that are added up here
    NUM_HEADS: tl.constexpr,
    TABLE_ROWS: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    HAS_POWERS: tl.constexpr,
    LAST: tl.constexpr,
):
    i_head, i_run = tl.program_id(0) % NUM_HEADS, tl.program_id(1)
    o_row = tl.program_id(0) // NUM_HEADS * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m_row = o_row < TABLE_ROWS
    b_sum = tl.zeros([BLOCK_PROGRAMS, BLOCK_ROWS], tl.float64)
    end = tl.minimum(i_run * run + run, programs)
    for first in range(i_run * run, end, BLOCK_PROGRAMS):
        o_program = first + tl.arange(0, BLOCK_PROGRAMS)
        m_add = o_program < end
        o_program = i_head.to(tl.int64) * programs + o_program
        if HAS_POWERS:
            b_power = tl.load(p_power + o_program, mask=m_add, other=0.0)
            m_add = b_power != 0.0
        p_tile = p_from + o_program[:, None] * TABLE_ROWS + o_row[None, :]
        b_x = tl.load(p_tile, mask=m_add[:, None] & m_row[None, :], other=0).to(tl.float64)
        if HAS_POWERS:
            b_x *= b_power.to(tl.float64)[:, None]
        b_sum += b_x
    if LAST:
        p_row = p_to + o_row * NUM_HEADS + i_head
    else:
        p_row = p_to + (i_head * tl.num_programs(1) + i_run).to(tl.int64) * TABLE_ROWS + o_row
    tl.store(p_row, tl.sum(b_sum, 0).to(p_to.dtype.element_ty), mask=m_row)


def add_rows(partial: Tensor, powers: Tensor) -> Tensor:
    """int64 [heads, programs, rows] and their powers of two [heads, programs] -> [rows, heads]."""
    heads, programs, rows = partial.shape
    grad = powers.new_empty(rows, heads)

    def launch(p_from: Tensor, p_to: Tensor, programs: int, run: int) -> None:
        add_rows_kernel[heads * triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(programs, run)](
            p_from, powers, p_to, programs, run, NUM_HEADS=heads, TABLE_ROWS=rows,
            BLOCK_PROGRAMS=BLOCK_PROGRAMS, BLOCK_ROWS=BLOCK_ROWS, HAS_POWERS=p_from is partial,
            LAST=p_to is grad, num_warps=4,
        )  # fmt: skip

    if programs <= RUN:
        launch(partial, grad, programs, programs)
    else:
        runs = triton.cdiv(programs, RUN)
        sums = partial.new_empty(heads, runs, rows, dtype=torch.float64)
        launch(partial, sums, programs, RUN)
        launch(sums, grad, runs, runs)
    return grad
