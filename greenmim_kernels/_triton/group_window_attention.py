"""Block-diagonal window attention in Triton: groups of at most 64 slots, in one tile.

A program takes one head of one group and loops over images. The bias tile, with -inf between
windows, stays in registers for all of them, and the backward pass sums its gradient there. Scores
are in base 2. Larger groups go to `long_groups`.
"""

import triton
import triton.language as tl

from .primitives import add_to_table, bias_tile, load_rows, load_slots, product, store_rows


@triton.jit
def group_attention_fwd_kernel(
    p_qkv,
    p_table,
    p_rows,
    p_window,
    p_coords,
    p_out,
    p_lse,
    batch,
    num_rows,  # of an image: N, or G * S for gathered groups
    num_groups,
    num_slots,
    images_per_program,
    scale_log2,  # scale * log2(e)
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COORD_WIDTH: tl.constexpr,  # 2 Mw - 1
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    GATHERED: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    C: tl.constexpr = NUM_HEADS * HEAD_DIM
    i_head = tl.program_id(0) % NUM_HEADS
    i_run = tl.program_id(0) // NUM_HEADS  # a run of images of a group
    i_group = i_run % num_groups
    first = (i_run // num_groups).to(tl.int64) * images_per_program  # int64: images are large
    group = i_group + (first * num_groups if PER_IMAGE else 0)
    b_row, b_window, b_position, m_slot, m_token = load_slots(
        p_rows, p_window, p_coords, group, 0, num_slots, COORD_WIDTH, GATHERED, BLOCK
    )
    if GATHERED:
        b_row += i_group * num_slots
        m_write = m_slot  # padding of gathered groups is written, as zeros
    else:
        m_write = m_token
    b_bias, _, _ = bias_tile(
        p_table, i_head, b_window, b_window, b_position, b_position, OFFSET, NUM_HEADS, HAS_TABLE
    )
    if tl.max(m_write.to(tl.int32), 0) > 0:
        for image in range(first, tl.minimum(first + images_per_program, batch)):
            p_q = p_qkv + image * num_rows * (3 * C) + i_head * HEAD_DIM
            b_q = load_rows(p_q, b_row, m_token, 3 * C, HEAD_DIM)  # [BLOCK, HEAD_DIM]
            b_k = load_rows(p_q + C, b_row, m_token, 3 * C, HEAD_DIM)
            b_v = load_rows(p_q + 2 * C, b_row, m_token, 3 * C, HEAD_DIM)
            b_score = product(b_q, tl.trans(b_k), PRECISION) * scale_log2 + b_bias
            # Padding rows have no pair at all: a finite pivot keeps them at zero instead of NaN.
            b_max = tl.where(m_token, tl.max(b_score, 1), 0.0)
            b_p = tl.exp2(b_score - b_max[:, None])  # [BLOCK, BLOCK]
            b_sum = tl.where(m_token, tl.sum(b_p, 1), 1.0)
            b_out = product(b_p.to(b_v.dtype), b_v, PRECISION) / b_sum[:, None]
            p_o = p_out + image * num_rows * C + i_head * HEAD_DIM
            store_rows(p_o, b_out, b_row, m_write, m_token, C, HEAD_DIM, GATHERED)
            b_lse = (b_max + tl.log2(b_sum)) * 0.6931471805599453
            tl.store(p_lse + (image * NUM_HEADS + i_head) * num_rows + b_row, b_lse, mask=m_write)


@triton.jit
def group_attention_bwd_kernel(
    p_grad_out,
    p_qkv,
    p_table,
    p_rows,
    p_window,
    p_coords,
    p_lse,
    p_grad_qkv,
    p_partial,  # int64 [programs, rows of the table]
    p_scale,  # fp32 [programs]
    batch,
    num_rows,
    num_groups,
    num_slots,
    images_per_program,
    scale,
    scale_log2,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COORD_WIDTH: tl.constexpr,
    OFFSET: tl.constexpr,
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
    i_head = tl.program_id(0) % NUM_HEADS
    i_run = tl.program_id(0) // NUM_HEADS  # a run of images of a group
    i_group = i_run % num_groups
    first = (i_run // num_groups).to(tl.int64) * images_per_program  # int64: images are large
    group = i_group + (first * num_groups if PER_IMAGE else 0)
    b_row, b_window, b_position, m_slot, m_token = load_slots(
        p_rows, p_window, p_coords, group, 0, num_slots, COORD_WIDTH, GATHERED, BLOCK
    )
    if GATHERED:
        b_row += i_group * num_slots
        m_write = m_slot
    else:
        m_write = m_token
    b_bias, b_entry, m_pair = bias_tile(
        p_table, i_head, b_window, b_window, b_position, b_position, OFFSET, NUM_HEADS, HAS_TABLE
    )
    if tl.max(m_write.to(tl.int32), 0) > 0:
        b_grad_bias = tl.zeros([BLOCK, BLOCK], tl.float32)
        for image in range(first, tl.minimum(first + images_per_program, batch)):
            start = image * num_rows * (3 * C) + i_head * HEAD_DIM
            p_q = p_qkv + start
            b_q = load_rows(p_q, b_row, m_token, 3 * C, HEAD_DIM)
            b_k = load_rows(p_q + C, b_row, m_token, 3 * C, HEAD_DIM)
            b_v = load_rows(p_q + 2 * C, b_row, m_token, 3 * C, HEAD_DIM)
            p_do = p_grad_out + image * num_rows * C + i_head * HEAD_DIM
            b_do = load_rows(p_do, b_row, m_token, C, HEAD_DIM)
            p_l = p_lse + (image * NUM_HEADS + i_head) * num_rows
            b_lse = tl.load(p_l + b_row, mask=m_token, other=0.0) * 1.4426950408889634
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
                store_rows(p_dq + 2 * C, b_dv, b_row, m_write, m_token, 3 * C, HEAD_DIM, GATHERED)
                b_ds_low = b_ds.to(b_q.dtype)
                b_dq = product(b_ds_low, b_k, PRECISION) * scale
                store_rows(p_dq, b_dq, b_row, m_write, m_token, 3 * C, HEAD_DIM, GATHERED)
                b_dk = product(tl.trans(b_ds_low), b_q, PRECISION) * scale
                store_rows(p_dq + C, b_dk, b_row, m_write, m_token, 3 * C, HEAD_DIM, GATHERED)
        if NEED_TABLE:
            program = i_head * (tl.num_programs(0) // NUM_HEADS) + i_run
            add_to_table(
                p_partial + program.to(tl.int64) * TABLE_ROWS,
                p_scale + program,
                b_grad_bias,
                b_entry,
                m_pair,
            )
