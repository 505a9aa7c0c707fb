"""Block-diagonal window attention in Triton for groups of more than 64 slots (windows of 14).

Queries and keys are taken BLOCK slots at a time with a running softmax. Slots are sorted by window,
so most pairs of blocks share no window and are passed over. The backward pass has a kernel for the
queries, one for keys and values, and one for the bias table, each with sums of its own: no atomics
on grad_qkv.
"""

from typing import NamedTuple

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
    out_rows,
    pair_entries,
    product,
    store_padding,
    store_rows,
    write_forward,
)
from .table_gradient import add_to_table, clear_row


class Queries(NamedTuple):
    """What the backward pass reads of a block of queries."""

    q: tl.tensor  # [BLOCK, HEAD_DIM]
    grad_out: tl.tensor
    lse: tl.tensor  # of the softmax's denominator, log2
    delta: tl.tensor  # sum_d out grad_out


@triton.jit
def may_share(queries, keys):
    """Whether two blocks may share a window; slots are sorted by it, so mostly they do then."""
    return (keys.low <= queries.high) & (queries.low <= keys.high)


@triton.jit
def load_keys(
    k, v, p_pad, image, place, slots, num_rows,
    NUM_HEADS: tl.constexpr, DIM: tl.constexpr, HEAD_DIM: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Keys and values. [BLOCK, HEAD_DIM]"""
    k_rows = head_rows(k, image, place, num_rows, 1, NUM_HEADS, DIM, PACKED)
    v_rows = head_rows(v, image, place, num_rows, 2, NUM_HEADS, DIM, PACKED)
    b_k = load_key_rows(k_rows, p_pad, place, slots, 1, NUM_HEADS, DIM, HEAD_DIM)
    return b_k, load_key_rows(v_rows, p_pad, place, slots, 2, NUM_HEADS, DIM, HEAD_DIM)


@triton.jit
def load_queries(
    p_grad_out, q, p_out, p_lse, image, place, slots, num_rows,
    NUM_HEADS: tl.constexpr, DIM: tl.constexpr, HEAD_DIM: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    q_rows = head_rows(q, image, place, num_rows, 0, NUM_HEADS, DIM, PACKED)
    b_q = load_rows(q_rows, slots, DIM, HEAD_DIM)
    do_rows = out_rows(p_grad_out, image, place, num_rows, NUM_HEADS, DIM)
    b_do = load_rows(do_rows, slots, DIM, HEAD_DIM)
    b_o = load_rows(out_rows(p_out, image, place, num_rows, NUM_HEADS, DIM), slots, DIM, HEAD_DIM)
    p_l = p_lse + (image * NUM_HEADS + place.head) * num_rows
    b_lse = tl.load(p_l + slots.row, mask=slots.m_token, other=0.0) * 1.4426950408889634
    return Queries(b_q, b_do, b_lse, tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1))


@triton.jit
def recompute(queries, b_k, b_v, b_bias, scale_log2, PRECISION: tl.constexpr):
    """P and dS of one pair of blocks. [BQ, BK]"""
    b_score = product(queries.q, tl.trans(b_k), PRECISION) * scale_log2 + b_bias
    b_p = tl.exp2(b_score - queries.lse[:, None])
    b_dp = product(queries.grad_out, tl.trans(b_v), PRECISION)
    return b_p, b_p * (b_dp - queries.delta[:, None])


@triton.jit(do_not_specialize=SIZES)
def long_attention_fwd_kernel(
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
    scale_log2,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    GATHERED: tl.constexpr,
    PACKED: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    k, v = (q, q) if PACKED else (k, v)
    place = locate(batch, num_groups, images, NUM_HEADS, PER_IMAGE)
    first = tl.program_id(1) * BLOCK
    slots = load_block(part, place, first, num_slots, GATHERED, BLOCK)
    if slots.any_row:
        for image in range(place.first, place.end):
            q_rows = head_rows(q, image, place, num_rows, 0, NUM_HEADS, DIM, PACKED)
            b_q = load_rows(q_rows, slots, DIM, HEAD_DIM)
            b_max = tl.full([BLOCK], float("-inf"), tl.float32)
            b_sum = tl.zeros([BLOCK], tl.float32)
            b_acc = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
            for k_first in range(0, num_slots, BLOCK):
                keys = load_block(part, place, k_first, num_slots, GATHERED, BLOCK)
                if may_share(slots, keys):
                    b_bias = bias_tile(p_table, place.head, slots, keys, NUM_HEADS, HAS_TABLE)
                    b_k, b_v = load_keys(
                        k, v, p_pad, image, place, keys, num_rows, NUM_HEADS, DIM, HEAD_DIM, PACKED
                    )
                    b_score = product(b_q, tl.trans(b_k), PRECISION) * scale_log2 + b_bias
                    b_new = tl.maximum(b_max, tl.max(b_score, 1))
                    # Rows that have met no key yet: a finite pivot, so that nothing is inf - inf.
                    b_pivot = tl.where(b_new == float("-inf"), 0.0, b_new)
                    b_p = tl.exp2(b_score - b_pivot[:, None])  # [BLOCK, BLOCK]
                    b_fade = tl.exp2(b_max - b_pivot)
                    b_sum = b_sum * b_fade + tl.sum(b_p, 1)
                    b_acc = b_acc * b_fade[:, None]
                    b_acc += product(b_p.to(b_v.dtype), b_v, PRECISION)
                    b_max = b_new
            write_forward(
                p_out, p_lse, image, place, slots, num_rows, b_acc, b_max, b_sum,
                NUM_HEADS, DIM, HEAD_DIM, GATHERED,
            )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def long_attention_bwd_query_kernel(
    part,
    p_grad_out,
    q,
    k,
    v,
    p_pad,
    p_table,
    p_out,
    p_lse,
    grad_q,  # Rows
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
    BLOCK: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    GATHERED: tl.constexpr,
    PACKED: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    k, v = (q, q) if PACKED else (k, v)
    place = locate(batch, num_groups, images, NUM_HEADS, PER_IMAGE)
    first = tl.program_id(1) * BLOCK
    slots = load_block(part, place, first, num_slots, GATHERED, BLOCK)
    if slots.any_row:
        for image in range(place.first, place.end):
            queries = load_queries(
                p_grad_out, q, p_out, p_lse, image, place, slots, num_rows,
                NUM_HEADS, DIM, HEAD_DIM, PACKED,
            )  # fmt: skip
            b_dq = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
            for k_first in range(0, num_slots, BLOCK):
                keys = load_block(part, place, k_first, num_slots, GATHERED, BLOCK)
                if may_share(slots, keys):
                    b_bias = bias_tile(p_table, place.head, slots, keys, NUM_HEADS, HAS_TABLE)
                    b_k, b_v = load_keys(
                        k, v, p_pad, image, place, keys, num_rows, NUM_HEADS, DIM, HEAD_DIM, PACKED
                    )
                    b_p, b_ds = recompute(queries, b_k, b_v, b_bias, scale_log2, PRECISION)
                    b_dq += product(b_ds.to(b_k.dtype), b_k, PRECISION)
            dq_rows = head_rows(grad_q, image, place, num_rows, 0, NUM_HEADS, DIM, PACKED)
            store_rows(dq_rows, b_dq * scale, slots, DIM, HEAD_DIM, GATHERED)


@triton.jit(do_not_specialize=SIZES)
def long_attention_bwd_key_kernel(
    part,
    p_grad_out,
    q,
    k,
    v,
    p_pad,
    p_table,
    p_out,
    p_lse,
    grad_k,  # Rows
    grad_v,
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
    BLOCK: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    GATHERED: tl.constexpr,
    PACKED: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    k, v = (q, q) if PACKED else (k, v)
    grad_v = grad_k if PACKED else grad_v
    place = locate(batch, num_groups, images, NUM_HEADS, PER_IMAGE)
    first = tl.program_id(1) * BLOCK
    keys = load_block(part, place, first, num_slots, GATHERED, BLOCK)
    if p_partial_pad is not None:
        b_pad_k = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
        b_pad_v = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    if keys.any_row | (keys.high >= 0):
        for image in range(place.first, place.end):
            b_k, b_v = load_keys(
                k, v, p_pad, image, place, keys, num_rows, NUM_HEADS, DIM, HEAD_DIM, PACKED
            )
            b_dk = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
            b_dv = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
            for q_first in range(0, num_slots, BLOCK):
                slots = load_block(part, place, q_first, num_slots, GATHERED, BLOCK)
                if may_share(slots, keys):
                    b_bias = bias_tile(p_table, place.head, slots, keys, NUM_HEADS, HAS_TABLE)
                    queries = load_queries(
                        p_grad_out, q, p_out, p_lse, image, place, slots, num_rows,
                        NUM_HEADS, DIM, HEAD_DIM, PACKED,
                    )  # fmt: skip
                    b_p, b_ds = recompute(queries, b_k, b_v, b_bias, scale_log2, PRECISION)
                    b_do = queries.grad_out
                    b_dv += product(tl.trans(b_p.to(b_do.dtype)), b_do, PRECISION)
                    b_dk += product(tl.trans(b_ds.to(b_do.dtype)), queries.q, PRECISION)
            dk_rows = head_rows(grad_k, image, place, num_rows, 1, NUM_HEADS, DIM, PACKED)
            store_rows(dk_rows, b_dk * scale, keys, DIM, HEAD_DIM, GATHERED)
            dv_rows = head_rows(grad_v, image, place, num_rows, 2, NUM_HEADS, DIM, PACKED)
            store_rows(dv_rows, b_dv, keys, DIM, HEAD_DIM, GATHERED)
            if p_partial_pad is not None:
                b_pad_k += tl.where(is_padding(keys)[:, None], b_dk * scale, 0.0)
                b_pad_v += tl.where(is_padding(keys)[:, None], b_dv, 0.0)
    if p_partial_pad is not None:
        per_head = tl.num_programs(0) // NUM_HEADS * tl.num_programs(1)
        program = place.head * per_head + place.run * tl.num_programs(1) + tl.program_id(1)
        store_padding(p_partial_pad, program, b_pad_k, b_pad_v, DIM, HEAD_DIM)


@triton.jit(do_not_specialize=SIZES)
def long_attention_bwd_table_kernel(
    part,
    p_grad_out,
    q,
    k,
    v,
    p_pad,
    p_table,
    p_out,
    p_lse,
    p_partial,
    p_power,
    batch,
    num_rows,
    num_groups,
    num_slots,
    images,
    scale_log2,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TABLE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GATHERED: tl.constexpr,
    PACKED: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    k, v = (q, q) if PACKED else (k, v)
    place = locate(batch, num_groups, images, NUM_HEADS, PER_IMAGE)
    blocks = tl.cdiv(num_slots, BLOCK)
    q_first, k_first = tl.program_id(1) // blocks * BLOCK, tl.program_id(1) % blocks * BLOCK
    slots = load_block(part, place, q_first, num_slots, GATHERED, BLOCK)
    keys = load_block(part, place, k_first, num_slots, GATHERED, BLOCK)
    per_head = tl.num_programs(0) // NUM_HEADS * tl.num_programs(1)
    program = place.head * per_head + place.run * tl.num_programs(1) + tl.program_id(1)
    if may_share(slots, keys):
        clear_row(p_partial, program, TABLE_ROWS)
        b_bias = bias_tile(p_table, place.head, slots, keys, NUM_HEADS, True)
        b_grad_bias = tl.zeros([BLOCK, BLOCK], tl.float32)
        for image in range(place.first, place.end):
            queries = load_queries(
                p_grad_out, q, p_out, p_lse, image, place, slots, num_rows,
                NUM_HEADS, DIM, HEAD_DIM, PACKED,
            )  # fmt: skip
            b_k, b_v = load_keys(
                k, v, p_pad, image, place, keys, num_rows, NUM_HEADS, DIM, HEAD_DIM, PACKED
            )
            _, b_ds = recompute(queries, b_k, b_v, b_bias, scale_log2, PRECISION)
            b_grad_bias += b_ds
        again = nothing(place)
        slots = load_block(part, place, q_first + again, num_slots, GATHERED, BLOCK)
        keys = load_block(part, place, k_first + again, num_slots, GATHERED, BLOCK)
        b_entry, m_pair = pair_entries(slots, keys)
        add_to_table(p_partial, p_power, program, b_grad_bias, b_entry, m_pair, TABLE_ROWS)
    else:
        tl.store(p_power + program, 0.0)
