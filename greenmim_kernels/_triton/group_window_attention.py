"""Block-diagonal window attention in Triton: groups of at most 64 slots, in one tile.

A program takes one head of one group and loops over images. The bias tile, with -inf between
windows, stays in registers for all of them, and the backward pass sums its gradient there. Scores
are in base 2. Larger groups go to `long_groups`.
"""

import triton
import triton.language as tl

from .primitives import (
    SIZES,
    bias_tile,
    load_block,
    load_rows,
    locate,
    nothing,
    pair_entries,
    product,
    store_rows,
    write_forward,
)
from .table_gradient import add_to_table, clear_row


@triton.jit(do_not_specialize=SIZES)
def group_attention_fwd_kernel(
    part,  # Partition
    p_qkv,
    p_table,
    p_out,
    p_lse,
    batch,
    num_rows,  # of an image: N, or G * S for gathered groups
    num_groups,
    num_slots,
    images,  # that a program goes over
    scale_log2,  # scale * log2(e)
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    GATHERED: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    C: tl.constexpr = NUM_HEADS * HEAD_DIM
    place = locate(batch, num_groups, images, NUM_HEADS, PER_IMAGE)
    slots = load_block(part, place, 0, num_slots, GATHERED, BLOCK)
    if slots.any_row:
        b_bias = bias_tile(p_table, place.head, slots, slots, NUM_HEADS, HAS_TABLE)
        for image in range(place.first, place.end):
            p_q = p_qkv + image * num_rows * (3 * C) + place.head * HEAD_DIM
            b_q = load_rows(p_q, slots.row, slots.m_token, 3 * C, HEAD_DIM)  # [BLOCK, HEAD_DIM]
            b_k = load_rows(p_q + C, slots.row, slots.m_token, 3 * C, HEAD_DIM)
            b_v = load_rows(p_q + 2 * C, slots.row, slots.m_token, 3 * C, HEAD_DIM)
            b_score = product(b_q, tl.trans(b_k), PRECISION) * scale_log2 + b_bias
            # Padding has no pair at all: a finite pivot keeps it at zero instead of NaN.
            b_max = tl.where(slots.m_token, tl.max(b_score, 1), 0.0)
            b_p = tl.exp2(b_score - b_max[:, None])  # [BLOCK, BLOCK]
            b_acc = product(b_p.to(b_v.dtype), b_v, PRECISION)
            write_forward(
                p_out, p_lse, image, place, slots, num_rows, b_acc, b_max, tl.sum(b_p, 1),
                NUM_HEADS, HEAD_DIM, GATHERED,
            )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def group_attention_bwd_kernel(
    part,
    p_grad_out,
    p_qkv,
    p_table,
    p_lse,
    p_grad_qkv,
    p_partial,  # int64 [programs, rows of the table]
    p_power,  # fp32 [programs]
    batch,
    num_rows,
    num_groups,
    num_slots,
    images,
    scale,
    scale_log2,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TABLE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    GATHERED: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    NEED_QKV: tl.constexpr,
    NEED_TABLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    C: tl.constexpr = NUM_HEADS * HEAD_DIM
    place = locate(batch, num_groups, images, NUM_HEADS, PER_IMAGE)
    slots = load_block(part, place, 0, num_slots, GATHERED, BLOCK)
    program = place.head * (tl.num_programs(0) // NUM_HEADS) + place.run
    if slots.any_row:
        if NEED_TABLE:
            clear_row(p_partial, program, TABLE_ROWS)
        b_bias = bias_tile(p_table, place.head, slots, slots, NUM_HEADS, HAS_TABLE)
        b_grad_bias = tl.zeros([BLOCK, BLOCK], tl.float32)
        for image in range(place.first, place.end):
            start = image * num_rows * (3 * C) + place.head * HEAD_DIM
            p_q = p_qkv + start
            b_q = load_rows(p_q, slots.row, slots.m_token, 3 * C, HEAD_DIM)
            b_k = load_rows(p_q + C, slots.row, slots.m_token, 3 * C, HEAD_DIM)
            b_v = load_rows(p_q + 2 * C, slots.row, slots.m_token, 3 * C, HEAD_DIM)
            p_do = p_grad_out + image * num_rows * C + place.head * HEAD_DIM
            b_do = load_rows(p_do, slots.row, slots.m_token, C, HEAD_DIM)
            p_l = p_lse + (image * NUM_HEADS + place.head) * num_rows
            b_lse = tl.load(p_l + slots.row, mask=slots.m_token, other=0.0) * 1.4426950408889634
            b_score = product(b_q, tl.trans(b_k), PRECISION) * scale_log2 + b_bias
            b_p = tl.exp2(b_score - b_lse[:, None])  # [BLOCK, BLOCK]
            b_dp = product(b_do, tl.trans(b_v), PRECISION)
            # delta = sum_j P dP: no read of `out`, and none of its rounding.
            b_ds = b_p * (b_dp - tl.sum(b_p * b_dp, 1)[:, None])
            if NEED_TABLE:
                b_grad_bias += b_ds
            if NEED_QKV:
                p_dq = p_grad_qkv + start
                b_dv = product(tl.trans(b_p.to(b_do.dtype)), b_do, PRECISION)
                store_rows(p_dq + 2 * C, b_dv, slots, 3 * C, HEAD_DIM, GATHERED)
                b_ds_low = b_ds.to(b_q.dtype)
                b_dq = product(b_ds_low, b_k, PRECISION) * scale
                store_rows(p_dq, b_dq, slots, 3 * C, HEAD_DIM, GATHERED)
                b_dk = product(tl.trans(b_ds_low), b_q, PRECISION) * scale
                store_rows(p_dq + C, b_dk, slots, 3 * C, HEAD_DIM, GATHERED)
        if NEED_TABLE:
            again = nothing(place)
            slots = load_block(part, place, again, num_slots, GATHERED, BLOCK)
            b_entry, m_pair = pair_entries(slots, slots)
            add_to_table(p_partial, p_power, program, b_grad_bias, b_entry, m_pair, TABLE_ROWS)
    elif NEED_TABLE:
        tl.store(p_power + program, 0.0)
