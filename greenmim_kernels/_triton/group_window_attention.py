"""Block-diagonal window attention in Triton: groups that fit one tile.

A program takes one head of one group and loops over images. The bias tile, with -inf between
windows, stays in registers for all of them, and the backward pass sums its gradient there. Scores
are scaled by log2(e), for exp2. Others go to `long_groups`; backward's limit is
`LARGEST_BACKWARD_TILE`.
"""

import triton
import triton.language as tl

from .primitives import (
    SIZES,
    bias_tile,
    head_rows,
    is_padding,
    load_block,
    load_key_rows,
    load_rows,
    locate,
    nothing,
    number_of,
    out_rows,
    pair_entries,
    product,
    store_padding,
    store_rows,
    write_forward,
)
from .table_gradient import add_to_table, clear_row


@triton.jit(do_not_specialize=SIZES)
def group_attention_fwd_kernel(
    part,  # Partition
    q,  # Rows
    k,
    v,
    p_pad,  # [3C], or None
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
    DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,  # of a tile: a power of two
    BLOCK: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    GATHERED: tl.constexpr,
    PACKED: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    k, v = (q, q) if PACKED else (k, v)
    place = locate(batch, num_groups, images, NUM_HEADS, PER_IMAGE)
    slots = load_block(part, place, 0, num_slots, GATHERED, BLOCK)
    if slots.any_row:
        b_bias = bias_tile(p_table, place.head, slots, slots, NUM_HEADS, HAS_TABLE)
        for image in range(place.first, place.end):
            q_rows = head_rows(q, image, place, num_rows, 0, NUM_HEADS, DIM, PACKED)
            k_rows = head_rows(k, image, place, num_rows, 1, NUM_HEADS, DIM, PACKED)
            v_rows = head_rows(v, image, place, num_rows, 2, NUM_HEADS, DIM, PACKED)
            b_q = load_rows(q_rows, slots, DIM, HEAD_DIM)  # [BLOCK, HEAD_DIM]
            b_k = load_key_rows(k_rows, p_pad, place, slots, 1, NUM_HEADS, DIM, HEAD_DIM)
            b_v = load_key_rows(v_rows, p_pad, place, slots, 2, NUM_HEADS, DIM, HEAD_DIM)
            b_score = product(b_q, tl.trans(b_k), PRECISION) * scale_log2 + b_bias
            # Padding has no pair at all: a finite pivot keeps it at zero instead of NaN.
            b_max = tl.where(slots.m_token, tl.max(b_score, 1), 0.0)
            b_p = tl.exp2(b_score - b_max[:, None])  # [BLOCK, BLOCK]
            b_acc = product(b_p.to(b_v.dtype), b_v, PRECISION)
            write_forward(
                p_out, p_lse, image, place, slots, num_rows, b_acc, b_max, tl.sum(b_p, 1),
                NUM_HEADS, DIM, HEAD_DIM, GATHERED,
            )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def group_attention_bwd_kernel(
    part,
    p_grad_out,
    q,
    k,
    v,
    p_pad,
    p_table,
    p_lse,
    grad_q,  # Rows
    grad_k,
    grad_v,
    p_partial,  # int64 [programs, rows of the table]
    p_power,  # fp32 [programs]
    p_partial_pad,  # fp32 [programs, 2, DIM], or None
    batch,
    num_rows,
    num_groups,
    num_slots,
    images,
    scale,
    scale_log2,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TABLE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    GATHERED: tl.constexpr,
    PACKED: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    NEED_QKV: tl.constexpr,
    NEED_TABLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    k, v = (q, q) if PACKED else (k, v)
    grad_k, grad_v = (grad_q, grad_q) if PACKED else (grad_k, grad_v)
    place = locate(batch, num_groups, images, NUM_HEADS, PER_IMAGE)
    slots = load_block(part, place, 0, num_slots, GATHERED, BLOCK)
    program = number_of(place, NUM_HEADS)
    if p_partial_pad is not None:
        b_pad_k = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
        b_pad_v = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    if slots.any_row:
        if NEED_TABLE:
            clear_row(p_partial, program, TABLE_ROWS)
        b_bias = bias_tile(p_table, place.head, slots, slots, NUM_HEADS, HAS_TABLE)
        b_grad_bias = tl.zeros([BLOCK, BLOCK], tl.float32)
        for image in range(place.first, place.end):
            q_rows = head_rows(q, image, place, num_rows, 0, NUM_HEADS, DIM, PACKED)
            k_rows = head_rows(k, image, place, num_rows, 1, NUM_HEADS, DIM, PACKED)
            v_rows = head_rows(v, image, place, num_rows, 2, NUM_HEADS, DIM, PACKED)
            b_q = load_rows(q_rows, slots, DIM, HEAD_DIM)
            b_k = load_key_rows(k_rows, p_pad, place, slots, 1, NUM_HEADS, DIM, HEAD_DIM)
            b_v = load_key_rows(v_rows, p_pad, place, slots, 2, NUM_HEADS, DIM, HEAD_DIM)
            do_rows = out_rows(p_grad_out, image, place, num_rows, NUM_HEADS, DIM)
            b_do = load_rows(do_rows, slots, DIM, HEAD_DIM)
            p_l = p_lse + (image * NUM_HEADS + place.head) * num_rows
            b_lse = tl.load(p_l + slots.row, mask=slots.m_token, other=0.0) * 1.4426950408889634
            b_score = product(b_q, tl.trans(b_k), PRECISION) * scale_log2 + b_bias
            b_p = tl.exp2(b_score - b_lse[:, None])  # [BLOCK, BLOCK]
            b_dp = product(b_do, tl.trans(b_v), PRECISION)
            # delta = sum_j P dP: no read of `out`, and none of its rounding.
            b_delta = tl.sum(b_p * b_dp, 1)
            if b_q.dtype == tl.float32:
                # Where scores are large, lse is rounded by more than float32's results may be off:
                # then P does not add up to one, and dS not to zero.
                b_delta = b_delta / tl.where(slots.m_token, tl.sum(b_p, 1), 1.0)
            b_ds = b_p * (b_dp - b_delta[:, None])
            if NEED_TABLE:
                b_grad_bias += b_ds
            if NEED_QKV:
                b_dv = product(tl.trans(b_p.to(b_do.dtype)), b_do, PRECISION)
                dv_rows = head_rows(grad_v, image, place, num_rows, 2, NUM_HEADS, DIM, PACKED)
                store_rows(dv_rows, b_dv, slots, DIM, HEAD_DIM, GATHERED)
                b_ds_low = b_ds.to(b_q.dtype)
                b_dq = product(b_ds_low, b_k, PRECISION) * scale
                dq_rows = head_rows(grad_q, image, place, num_rows, 0, NUM_HEADS, DIM, PACKED)
                store_rows(dq_rows, b_dq, slots, DIM, HEAD_DIM, GATHERED)
                b_dk = product(tl.trans(b_ds_low), b_q, PRECISION) * scale
                dk_rows = head_rows(grad_k, image, place, num_rows, 1, NUM_HEADS, DIM, PACKED)
                store_rows(dk_rows, b_dk, slots, DIM, HEAD_DIM, GATHERED)
                if p_partial_pad is not None:
                    b_pad_k += tl.where(is_padding(slots)[:, None], b_dk, 0.0)
                    b_pad_v += tl.where(is_padding(slots)[:, None], b_dv, 0.0)
        if NEED_TABLE:
            again = nothing(place)
            slots = load_block(part, place, again, num_slots, GATHERED, BLOCK)
            b_entry, m_pair = pair_entries(slots, slots)
            add_to_table(p_partial, p_power, program, b_grad_bias, b_entry, m_pair, TABLE_ROWS)
    elif NEED_TABLE:
        tl.store(p_power + program, 0.0)
    if p_partial_pad is not None:
        store_padding(p_partial_pad, program, b_pad_k, b_pad_v, DIM, HEAD_DIM)
