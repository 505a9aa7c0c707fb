"""Block-diagonal window attention in Triton for groups that do not fit one tile (windows of 14).

A program takes a block of slots and loops over its band: the slots of its windows, which are
adjacent because slots are sorted by window. Forward uses an online softmax. Backward there is a
kernel for the queries, one for keys and values, and one for the bias table, which takes one pair of
blocks; each has sums of its own: no atomics on grad_qkv.

With one mask for the batch, `expand_bias_kernel` first writes the bias of all pairs of a group's
slots, -inf between windows. An image then reads tiles of it, 16 bytes at a time, instead of looking
pairs up in the table, which costs more instructions than the attention itself.
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
    number_of,
    out_rows,
    pair_entries,
    product,
    store_padding,
    store_rows,
    write_forward,
)
from .table_gradient import add_to_table, clear_row

# Tiles start at multiples of ALIGNMENT and span at most LARGEST_TILE slots. `reach_of` bounds where
# they end.
ALIGNMENT = tl.constexpr(16)
LARGEST_TILE = tl.constexpr(64)


class Band(NamedTuple):
    """The slots of a block's windows."""

    first: tl.tensor  # rounded down to a multiple of ALIGNMENT
    end: tl.tensor


@triton.jit
def find_band(part, place, slots, num_slots):
    """The band of a block of slots."""
    first, end = num_slots, 0
    for start in range(0, num_slots, 256):
        o_slot = start + tl.arange(0, 256)
        at = place.part_group * num_slots + o_slot
        b_window = tl.load(part.window_id + at, mask=o_slot < num_slots, other=-1)
        m_band = (b_window >= slots.low) & (b_window <= slots.high)
        first = tl.minimum(first, tl.min(tl.where(m_band, o_slot, num_slots), 0))
        end = tl.maximum(end, tl.max(tl.where(m_band, o_slot + 1, 0), 0))
    return Band(first // ALIGNMENT * ALIGNMENT, end)


@triton.jit
def reach_of(num_slots):
    """Upper bound on the end of a tile: the side of a group's expanded bias."""
    return (num_slots - 1) // ALIGNMENT * ALIGNMENT + LARGEST_TILE


@triton.jit
def expanded_tile(
    p_expanded, place, first, k_first, num_groups, num_slots,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Where a tile of this head and group stands in the expanded bias. [QUERIES, KEYS]"""
    reach = reach_of(num_slots)
    o_row = (place.head * num_groups + place.group) * reach + first + tl.arange(0, QUERIES)
    return p_expanded + o_row[:, None] * reach + k_first + tl.arange(0, KEYS)[None, :]


@triton.jit(do_not_specialize=["num_groups", "num_slots"])
def expand_bias_kernel(
    part,  # Partition of one mask
    p_table,
    p_expanded,  # fp32 [heads, groups, reach, reach]
    num_groups,
    num_slots,
    NUM_HEADS: tl.constexpr,
    GATHERED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The bias of all pairs of a group's slots, times log2(e), -inf between windows."""
    place = locate(1, num_groups, 1, NUM_HEADS, False)
    first, k_first = tl.program_id(1) * QUERIES, tl.program_id(2) * KEYS
    slots = load_block(part, place, first, num_slots, GATHERED, QUERIES)
    keys = load_block(part, place, k_first, num_slots, GATHERED, KEYS)
    b_bias = bias_tile(p_table, place.head, slots, keys, NUM_HEADS, True)
    reach = reach_of(num_slots)
    m_row, m_column = first + tl.arange(0, QUERIES) < reach, k_first + tl.arange(0, KEYS) < reach
    p_tile = expanded_tile(p_expanded, place, first, k_first, num_groups, num_slots, QUERIES, KEYS)
    tl.store(p_tile, b_bias, mask=m_row[:, None] & m_column[None, :])


@triton.jit
def pair_bias(
    p_table, p_expanded, place, slots, keys, first, k_first, num_groups, num_slots,
    NUM_HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `bias_tile`, from the expanded bias where there is one. [BQ, BK]"""
    if p_expanded is not None:
        p_tile = expanded_tile(
            p_expanded, place, first, k_first, num_groups, num_slots, BLOCK, BLOCK
        )
        # Read again for the next image; keep it in L1 while q, k and v stream through.
        b_bias = tl.load(p_tile, eviction_policy="evict_last")
    else:
        b_bias = bias_tile(p_table, place.head, slots, keys, NUM_HEADS, p_table is not None)
    return b_bias


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
    p_grad_out, q, image, place, slots, num_rows,
    NUM_HEADS: tl.constexpr, DIM: tl.constexpr, HEAD_DIM: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Queries and the gradient of their output. [BLOCK, HEAD_DIM]"""
    q_rows = head_rows(q, image, place, num_rows, 0, NUM_HEADS, DIM, PACKED)
    do_rows = out_rows(p_grad_out, image, place, num_rows, NUM_HEADS, DIM)
    return load_rows(q_rows, slots, DIM, HEAD_DIM), load_rows(do_rows, slots, DIM, HEAD_DIM)


@triton.jit
def attention(b_q, b_k, b_lse, b_bias, scale_log2, PRECISION: tl.constexpr):
    """P of one pair of blocks. [BQ, BK]"""
    b_score = product(b_q, tl.trans(b_k), PRECISION) * scale_log2 + b_bias
    return tl.exp2(b_score - b_lse[:, None])


@triton.jit
def grad_score(b_p, b_v, b_do, b_delta, PRECISION: tl.constexpr):
    """dS of one pair of blocks. [BQ, BK]"""
    return b_p * (product(b_do, tl.trans(b_v), PRECISION) - b_delta[:, None])


@triton.jit
def slot_offsets(
    image, place, first, num_groups, num_slots, NUM_HEADS: tl.constexpr, BLOCK: tl.constexpr
):
    """Offsets of these slots in p_slot_lse and p_slot_delta. [BLOCK]"""
    group = (image * NUM_HEADS + place.head) * num_groups + place.group
    return group * num_slots + first + tl.arange(0, BLOCK)


@triton.jit(do_not_specialize=SIZES)
def long_attention_fwd_kernel(
    part,  # Partition
    q,  # Rows
    k,
    v,
    p_pad,  # [3C], or None
    p_table,  # or None
    p_expanded,  # or None
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
    GATHERED: tl.constexpr,
    PACKED: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output and lse of a block of queries."""
    k, v = (q, q) if PACKED else (k, v)
    blocks = tl.cdiv(num_slots, BLOCK)
    place = locate(batch, num_groups, images, NUM_HEADS, PER_IMAGE, blocks)
    first = tl.program_id(0) // NUM_HEADS % blocks * BLOCK
    slots = load_block(part, place, first, num_slots, GATHERED, BLOCK)
    if slots.any_row:
        band = find_band(part, place, slots, num_slots)
        for image in range(place.first, place.end):
            q_rows = head_rows(q, image, place, num_rows, 0, NUM_HEADS, DIM, PACKED)
            b_q = load_rows(q_rows, slots, DIM, HEAD_DIM)
            b_max = tl.full([BLOCK], float("-inf"), tl.float32)
            b_sum = tl.zeros([BLOCK], tl.float32)
            b_acc = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
            for k_first in range(band.first, band.end, BLOCK):
                keys = load_block(part, place, k_first, num_slots, GATHERED, BLOCK)
                b_k, b_v = load_keys(
                    k, v, p_pad, image, place, keys, num_rows, NUM_HEADS, DIM, HEAD_DIM, PACKED
                )
                b_bias = pair_bias(
                    p_table, p_expanded, place, slots, keys, first, k_first, num_groups, num_slots,
                    NUM_HEADS, BLOCK,
                )  # fmt: skip
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
    p_expanded,
    p_out,
    p_lse,
    # fp32 [batch, heads, groups, slots], base 2; 0 in slots that hold no query, unset in blocks
    # without a window
    p_slot_lse,
    p_slot_delta,  # likewise: sum_d out grad_out
    grad_q,  # Rows, or None
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
    GATHERED: tl.constexpr,
    PACKED: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    NEED_QKV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_q of a block, and lse and delta per slot."""
    k, v = (q, q) if PACKED else (k, v)
    blocks = tl.cdiv(num_slots, BLOCK)
    place = locate(batch, num_groups, images, NUM_HEADS, PER_IMAGE, blocks)
    first = tl.program_id(0) // NUM_HEADS % blocks * BLOCK
    slots = load_block(part, place, first, num_slots, GATHERED, BLOCK)
    if slots.any_row | (slots.high >= 0):
        band = find_band(part, place, slots, num_slots)
        for image in range(place.first, place.end):
            b_q, b_do = load_queries(
                p_grad_out, q, image, place, slots, num_rows, NUM_HEADS, DIM, HEAD_DIM, PACKED
            )
            o_rows = out_rows(p_out, image, place, num_rows, NUM_HEADS, DIM)
            b_o = load_rows(o_rows, slots, DIM, HEAD_DIM).to(tl.float32)
            b_delta = tl.sum(b_do.to(tl.float32) * b_o, 1)
            p_l = p_lse + (image * NUM_HEADS + place.head) * num_rows + slots.row
            b_lse = tl.load(p_l, mask=slots.m_token, other=0.0) * 1.4426950408889634
            if NEED_QKV:
                b_dq = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
                # The output is rounded, and delta with it: rows of dS add up to b_off, not to 0,
                # which a large logit scale multiplies. P k takes it away again.
                b_pk = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
                b_off = tl.zeros([BLOCK], tl.float32)
                for k_first in range(band.first, band.end, BLOCK):
                    keys = load_block(part, place, k_first, num_slots, GATHERED, BLOCK)
                    b_bias = pair_bias(
                        p_table, p_expanded, place, slots, keys, first, k_first, num_groups,
                        num_slots, NUM_HEADS, BLOCK,
                    )  # fmt: skip
                    b_k, b_v = load_keys(
                        k, v, p_pad, image, place, keys, num_rows, NUM_HEADS, DIM, HEAD_DIM, PACKED
                    )
                    b_p = attention(b_q, b_k, b_lse, b_bias, scale_log2, PRECISION)
                    b_ds = grad_score(b_p, b_v, b_do, b_delta, PRECISION)
                    b_dq += product(b_ds.to(b_k.dtype), b_k, PRECISION)
                    if b_q.dtype != tl.float32:
                        b_pk += product(b_p.to(b_k.dtype), b_k, PRECISION)
                        b_off += tl.sum(b_ds, 1)
                b_dq -= b_off[:, None] * b_pk
                b_delta += b_off
                dq_rows = head_rows(grad_q, image, place, num_rows, 0, NUM_HEADS, DIM, PACKED)
                store_rows(dq_rows, b_dq * scale, slots, DIM, HEAD_DIM, GATHERED)
            o_slot = slot_offsets(image, place, first, num_groups, num_slots, NUM_HEADS, BLOCK)
            m_slot = first + tl.arange(0, BLOCK) < num_slots
            tl.store(p_slot_lse + o_slot, b_lse, mask=m_slot)
            tl.store(p_slot_delta + o_slot, b_delta, mask=m_slot)


@triton.jit(do_not_specialize=SIZES)
def long_attention_bwd_key_kernel(
    part,
    p_grad_out,
    q,
    k,
    v,
    p_pad,
    p_table,
    p_expanded,
    p_slot_lse,
    p_slot_delta,
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
    GATHERED: tl.constexpr,
    PACKED: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_k and grad_v of a block of keys."""
    k, v = (q, q) if PACKED else (k, v)
    grad_v = grad_k if PACKED else grad_v
    blocks = tl.cdiv(num_slots, BLOCK)
    place = locate(batch, num_groups, images, NUM_HEADS, PER_IMAGE, blocks)
    first = tl.program_id(0) // NUM_HEADS % blocks * BLOCK
    keys = load_block(part, place, first, num_slots, GATHERED, BLOCK)
    if p_partial_pad is not None:
        b_pad_k = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
        b_pad_v = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    if keys.any_row | (keys.high >= 0):
        band = find_band(part, place, keys, num_slots)
        for image in range(place.first, place.end):
            b_k, b_v = load_keys(
                k, v, p_pad, image, place, keys, num_rows, NUM_HEADS, DIM, HEAD_DIM, PACKED
            )
            b_dk = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
            b_dv = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
            for q_first in range(band.first, band.end, BLOCK):
                slots = load_block(part, place, q_first, num_slots, GATHERED, BLOCK)
                b_q, b_do = load_queries(
                    p_grad_out, q, image, place, slots, num_rows, NUM_HEADS, DIM, HEAD_DIM, PACKED
                )
                b_bias = pair_bias(
                    p_table, p_expanded, place, slots, keys, q_first, first, num_groups, num_slots,
                    NUM_HEADS, BLOCK,
                )  # fmt: skip
                o_slot = slot_offsets(
                    image, place, q_first, num_groups, num_slots, NUM_HEADS, BLOCK
                )
                m_slot = q_first + tl.arange(0, BLOCK) < band.end
                b_lse = tl.load(p_slot_lse + o_slot, mask=m_slot, other=0.0)
                b_delta = tl.load(p_slot_delta + o_slot, mask=m_slot, other=0.0)
                b_p = attention(b_q, b_k, b_lse, b_bias, scale_log2, PRECISION)
                b_dv += product(tl.trans(b_p.to(b_do.dtype)), b_do, PRECISION)
                b_ds = grad_score(b_p, b_v, b_do, b_delta, PRECISION)
                b_dk += product(tl.trans(b_ds.to(b_q.dtype)), b_q, PRECISION)
            dk_rows = head_rows(grad_k, image, place, num_rows, 1, NUM_HEADS, DIM, PACKED)
            store_rows(dk_rows, b_dk * scale, keys, DIM, HEAD_DIM, GATHERED)
            dv_rows = head_rows(grad_v, image, place, num_rows, 2, NUM_HEADS, DIM, PACKED)
            store_rows(dv_rows, b_dv, keys, DIM, HEAD_DIM, GATHERED)
            if p_partial_pad is not None:
                b_pad_k += tl.where(is_padding(keys)[:, None], b_dk * scale, 0.0)
                b_pad_v += tl.where(is_padding(keys)[:, None], b_dv, 0.0)
    if p_partial_pad is not None:
        program = number_of(place, NUM_HEADS)
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
    p_expanded,
    p_slot_lse,
    p_slot_delta,
    p_partial,  # int64 [programs, rows of the table]
    p_power,  # fp32 [programs]
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
    """dS of one pair of blocks, summed over images, added to this program's row."""
    k, v = (q, q) if PACKED else (k, v)
    blocks = tl.cdiv(num_slots, BLOCK)
    place = locate(batch, num_groups, images, NUM_HEADS, PER_IMAGE, blocks * blocks)
    i_pair = tl.program_id(0) // NUM_HEADS % (blocks * blocks)
    first = i_pair // blocks * BLOCK
    slots = load_block(part, place, first, num_slots, GATHERED, BLOCK)
    band = find_band(part, place, slots, num_slots)
    k_first = band.first + i_pair % blocks * BLOCK
    program = number_of(place, NUM_HEADS)
    if k_first < band.end:
        clear_row(p_partial, program, TABLE_ROWS)
        keys = load_block(part, place, k_first, num_slots, GATHERED, BLOCK)
        b_bias = pair_bias(
            p_table, p_expanded, place, slots, keys, first, k_first, num_groups, num_slots,
            NUM_HEADS, BLOCK,
        )  # fmt: skip
        b_grad_bias = tl.zeros([BLOCK, BLOCK], tl.float32)
        for image in range(place.first, place.end):
            b_q, b_do = load_queries(
                p_grad_out, q, image, place, slots, num_rows, NUM_HEADS, DIM, HEAD_DIM, PACKED
            )
            b_k, b_v = load_keys(
                k, v, p_pad, image, place, keys, num_rows, NUM_HEADS, DIM, HEAD_DIM, PACKED
            )
            o_slot = slot_offsets(image, place, first, num_groups, num_slots, NUM_HEADS, BLOCK)
            b_lse = tl.load(p_slot_lse + o_slot, mask=slots.m_token, other=0.0)
            b_delta = tl.load(p_slot_delta + o_slot, mask=slots.m_token, other=0.0)
            b_p = attention(b_q, b_k, b_lse, b_bias, scale_log2, PRECISION)
            b_ds = grad_score(b_p, b_v, b_do, b_delta, PRECISION)
            b_grad_bias += b_ds
        again = nothing(place)
        slots = load_block(part, place, first + again, num_slots, GATHERED, BLOCK)
        keys = load_block(part, place, k_first + again, num_slots, GATHERED, BLOCK)
        b_entry, m_pair = pair_entries(slots, keys)
        add_to_table(p_partial, p_power, program, b_grad_bias, b_entry, m_pair, TABLE_ROWS)
    else:
        tl.store(p_power + program, 0.0)
