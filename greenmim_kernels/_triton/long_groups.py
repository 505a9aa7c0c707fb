"""Block-diagonal window attention in Triton for groups of more than 64 slots (windows of 14).

Queries and keys are taken BLOCK slots at a time with a running softmax. Slots are sorted by window,
so most pairs of blocks share no window and are passed over. The backward pass has a kernel for the
queries, one for keys and values, and one for the bias table, each with sums of its own: no atomics
on grad_qkv.
"""

import triton
import triton.language as tl

from .primitives import add_to_table, bias_tile, load_rows, load_slots, product, store_rows


@triton.jit
def load_block(
    p_rows, p_window, p_coords, i_group, group, first, num_slots, COORD_WIDTH, GATHERED, BLOCK
):
    """`load_slots`, with rows counted from the start of the image, and which rows are written."""
    b_row, b_window, b_position, m_slot, m_token = load_slots(
        p_rows, p_window, p_coords, group, first, num_slots, COORD_WIDTH, GATHERED, BLOCK
    )
    if GATHERED:
        b_row += i_group * num_slots
        m_write = m_slot
    else:
        m_write = m_token
    return b_row, b_window, b_position, m_token, m_write


@triton.jit
def recompute(b_q, b_k, b_v, b_do, b_bias, b_lse, b_delta, scale_log2, PRECISION: tl.constexpr):
    """P and dS of one pair of blocks. [BQ, BK]"""
    b_score = product(b_q, tl.trans(b_k), PRECISION) * scale_log2 + b_bias
    b_p = tl.exp2(b_score - b_lse[:, None])
    b_dp = product(b_do, tl.trans(b_v), PRECISION)
    return b_p, b_p * (b_dp - b_delta[:, None])


@triton.jit
def load_query_side(
    p_qkv, p_out, p_grad_out, p_lse, image, i_head, num_rows, b_row, m_token, NUM_HEADS, HEAD_DIM
):
    """q, grad_out, log2 of the softmax's denominator, and delta = sum_d out grad_out."""
    C: tl.constexpr = NUM_HEADS * HEAD_DIM
    b_q = load_rows(
        p_qkv + image * num_rows * (3 * C) + i_head * HEAD_DIM, b_row, m_token, 3 * C, HEAD_DIM
    )
    start = image * num_rows * C + i_head * HEAD_DIM
    b_do = load_rows(p_grad_out + start, b_row, m_token, C, HEAD_DIM)
    b_o = load_rows(p_out + start, b_row, m_token, C, HEAD_DIM)
    p_l = p_lse + (image * NUM_HEADS + i_head) * num_rows
    b_lse = tl.load(p_l + b_row, mask=m_token, other=0.0) * 1.4426950408889634
    return b_q, b_do, b_lse, tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)


@triton.jit
def long_attention_fwd_kernel(
    p_qkv,
    p_table,
    p_rows,
    p_window,
    p_coords,
    p_out,
    p_lse,
    batch,
    num_rows,
    num_groups,
    num_slots,
    images_per_program,
    scale_log2,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COORD_WIDTH: tl.constexpr,
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
    first = (i_run // num_groups).to(tl.int64) * images_per_program
    group = i_group + (first * num_groups if PER_IMAGE else 0)
    b_row, b_window, b_position, m_token, m_write = load_block(
        p_rows, p_window, p_coords, i_group, group, tl.program_id(1) * BLOCK, num_slots,
        COORD_WIDTH, GATHERED, BLOCK,
    )  # fmt: skip
    if tl.max(m_write.to(tl.int32), 0) > 0:
        for image in range(first, tl.minimum(first + images_per_program, batch)):
            p_q = p_qkv + image * num_rows * (3 * C) + i_head * HEAD_DIM
            b_q = load_rows(p_q, b_row, m_token, 3 * C, HEAD_DIM)
            b_max = tl.full([BLOCK], float("-inf"), tl.float32)
            b_sum = tl.zeros([BLOCK], tl.float32)
            b_acc = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
            for k_first in range(0, num_slots, BLOCK):
                b_row_k, b_window_k, b_position_k, m_key, _ = load_block(
                    p_rows, p_window, p_coords, i_group, group, k_first, num_slots,
                    COORD_WIDTH, GATHERED, BLOCK,
                )  # fmt: skip
                b_bias, b_entry, m_pair = bias_tile(
                    p_table, i_head, b_window, b_window_k, b_position, b_position_k,
                    OFFSET, NUM_HEADS, HAS_TABLE,
                )  # fmt: skip
                if tl.max(tl.max(m_pair.to(tl.int32), 1), 0) > 0:
                    b_k = load_rows(p_q + C, b_row_k, m_key, 3 * C, HEAD_DIM)
                    b_v = load_rows(p_q + 2 * C, b_row_k, m_key, 3 * C, HEAD_DIM)
                    b_score = product(b_q, tl.trans(b_k), PRECISION) * scale_log2 + b_bias
                    b_new = tl.maximum(b_max, tl.max(b_score, 1))
                    # Rows that have met no key yet: a finite pivot, so that nothing is inf - inf.
                    b_pivot = tl.where(b_new == float("-inf"), 0.0, b_new)
                    b_p = tl.exp2(b_score - b_pivot[:, None])
                    b_fade = tl.exp2(b_max - b_pivot)
                    b_sum = b_sum * b_fade + tl.sum(b_p, 1)
                    b_acc = b_acc * b_fade[:, None]
                    b_acc += product(b_p.to(b_v.dtype), b_v, PRECISION)
                    b_max = b_new
            b_max = tl.where(m_token, b_max, 0.0)
            b_sum = tl.where(m_token, b_sum, 1.0)
            p_o = p_out + image * num_rows * C + i_head * HEAD_DIM
            store_rows(p_o, b_acc / b_sum[:, None], b_row, m_write, m_token, C, HEAD_DIM, GATHERED)
            b_lse = (b_max + tl.log2(b_sum)) * 0.6931471805599453
            tl.store(p_lse + (image * NUM_HEADS + i_head) * num_rows + b_row, b_lse, mask=m_write)


@triton.jit
def long_attention_bwd_query_kernel(
    p_grad_out,
    p_qkv,
    p_table,
    p_rows,
    p_window,
    p_coords,
    p_out,
    p_lse,
    p_grad_qkv,
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
    first = (i_run // num_groups).to(tl.int64) * images_per_program
    group = i_group + (first * num_groups if PER_IMAGE else 0)
    b_row, b_window, b_position, m_token, m_write = load_block(
        p_rows, p_window, p_coords, i_group, group, tl.program_id(1) * BLOCK, num_slots,
        COORD_WIDTH, GATHERED, BLOCK,
    )  # fmt: skip
    if tl.max(m_write.to(tl.int32), 0) > 0:
        for image in range(first, tl.minimum(first + images_per_program, batch)):
            start = image * num_rows * (3 * C) + i_head * HEAD_DIM
            b_q, b_do, b_lse, b_delta = load_query_side(
                p_qkv, p_out, p_grad_out, p_lse, image, i_head, num_rows, b_row, m_token,
                NUM_HEADS, HEAD_DIM,
            )  # fmt: skip
            b_dq = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
            for k_first in range(0, num_slots, BLOCK):
                b_row_k, b_window_k, b_position_k, m_key, _ = load_block(
                    p_rows, p_window, p_coords, i_group, group, k_first, num_slots,
                    COORD_WIDTH, GATHERED, BLOCK,
                )  # fmt: skip
                b_bias, b_entry, m_pair = bias_tile(
                    p_table, i_head, b_window, b_window_k, b_position, b_position_k,
                    OFFSET, NUM_HEADS, HAS_TABLE,
                )  # fmt: skip
                if tl.max(tl.max(m_pair.to(tl.int32), 1), 0) > 0:
                    b_k = load_rows(p_qkv + start + C, b_row_k, m_key, 3 * C, HEAD_DIM)
                    b_v = load_rows(p_qkv + start + 2 * C, b_row_k, m_key, 3 * C, HEAD_DIM)
                    b_p, b_ds = recompute(
                        b_q, b_k, b_v, b_do, b_bias, b_lse, b_delta, scale_log2, PRECISION
                    )
                    b_dq += product(b_ds.to(b_k.dtype), b_k, PRECISION)
            store_rows(
                p_grad_qkv + start, b_dq * scale, b_row, m_write, m_token, 3 * C, HEAD_DIM, GATHERED
            )


@triton.jit
def long_attention_bwd_key_kernel(
    p_grad_out,
    p_qkv,
    p_table,
    p_rows,
    p_window,
    p_coords,
    p_out,
    p_lse,
    p_grad_qkv,
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
    first = (i_run // num_groups).to(tl.int64) * images_per_program
    group = i_group + (first * num_groups if PER_IMAGE else 0)
    b_row_k, b_window_k, b_position_k, m_key, m_write = load_block(
        p_rows, p_window, p_coords, i_group, group, tl.program_id(1) * BLOCK, num_slots,
        COORD_WIDTH, GATHERED, BLOCK,
    )  # fmt: skip
    if tl.max(m_write.to(tl.int32), 0) > 0:
        for image in range(first, tl.minimum(first + images_per_program, batch)):
            start = image * num_rows * (3 * C) + i_head * HEAD_DIM
            b_k = load_rows(p_qkv + start + C, b_row_k, m_key, 3 * C, HEAD_DIM)
            b_v = load_rows(p_qkv + start + 2 * C, b_row_k, m_key, 3 * C, HEAD_DIM)
            b_dk = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
            b_dv = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
            for q_first in range(0, num_slots, BLOCK):
                b_row, b_window, b_position, m_token, _ = load_block(
                    p_rows, p_window, p_coords, i_group, group, q_first, num_slots,
                    COORD_WIDTH, GATHERED, BLOCK,
                )  # fmt: skip
                b_bias, b_entry, m_pair = bias_tile(
                    p_table, i_head, b_window, b_window_k, b_position, b_position_k,
                    OFFSET, NUM_HEADS, HAS_TABLE,
                )  # fmt: skip
                if tl.max(tl.max(m_pair.to(tl.int32), 1), 0) > 0:
                    b_q, b_do, b_lse, b_delta = load_query_side(
                        p_qkv, p_out, p_grad_out, p_lse, image, i_head, num_rows, b_row, m_token,
                        NUM_HEADS, HEAD_DIM,
                    )  # fmt: skip
                    b_p, b_ds = recompute(
                        b_q, b_k, b_v, b_do, b_bias, b_lse, b_delta, scale_log2, PRECISION
                    )
                    b_dv += product(tl.trans(b_p.to(b_do.dtype)), b_do, PRECISION)
                    b_dk += product(tl.trans(b_ds.to(b_q.dtype)), b_q, PRECISION)
            p_dk = p_grad_qkv + start + C
            store_rows(p_dk, b_dk * scale, b_row_k, m_write, m_key, 3 * C, HEAD_DIM, GATHERED)
            store_rows(p_dk + C, b_dv, b_row_k, m_write, m_key, 3 * C, HEAD_DIM, GATHERED)


@triton.jit
def long_attention_bwd_table_kernel(
    p_grad_out,
    p_qkv,
    p_table,
    p_rows,
    p_window,
    p_coords,
    p_out,
    p_lse,
    p_partial,
    p_scale,
    batch,
    num_rows,
    num_groups,
    num_slots,
    images_per_program,
    scale_log2,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COORD_WIDTH: tl.constexpr,
    OFFSET: tl.constexpr,
    TABLE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GATHERED: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    C: tl.constexpr = NUM_HEADS * HEAD_DIM
    i_head = tl.program_id(0) % NUM_HEADS
    i_run = tl.program_id(0) // NUM_HEADS  # a run of images of a group
    i_group = i_run % num_groups
    blocks = tl.cdiv(num_slots, BLOCK)
    i_query, i_key = tl.program_id(1) // blocks, tl.program_id(1) % blocks
    first = (i_run // num_groups).to(tl.int64) * images_per_program
    group = i_group + (first * num_groups if PER_IMAGE else 0)
    b_row, b_window, b_position, m_token, _ = load_block(
        p_rows, p_window, p_coords, i_group, group, i_query * BLOCK, num_slots,
        COORD_WIDTH, GATHERED, BLOCK,
    )  # fmt: skip
    b_row_k, b_window_k, b_position_k, m_key, _ = load_block(
        p_rows, p_window, p_coords, i_group, group, i_key * BLOCK, num_slots,
        COORD_WIDTH, GATHERED, BLOCK,
    )  # fmt: skip
    b_bias, b_entry, m_pair = bias_tile(
        p_table, i_head, b_window, b_window_k, b_position, b_position_k, OFFSET, NUM_HEADS, True
    )
    if tl.max(tl.max(m_pair.to(tl.int32), 1), 0) > 0:
        b_grad_bias = tl.zeros([BLOCK, BLOCK], tl.float32)
        for image in range(first, tl.minimum(first + images_per_program, batch)):
            b_q, b_do, b_lse, b_delta = load_query_side(
                p_qkv, p_out, p_grad_out, p_lse, image, i_head, num_rows, b_row, m_token,
                NUM_HEADS, HEAD_DIM,
            )  # fmt: skip
            p_k = p_qkv + image * num_rows * (3 * C) + C + i_head * HEAD_DIM
            b_k = load_rows(p_k, b_row_k, m_key, 3 * C, HEAD_DIM)
            b_v = load_rows(p_k + C, b_row_k, m_key, 3 * C, HEAD_DIM)
            b_p, b_ds = recompute(
                b_q, b_k, b_v, b_do, b_bias, b_lse, b_delta, scale_log2, PRECISION
            )
            b_grad_bias += b_ds
        per_head = tl.num_programs(0) // NUM_HEADS * tl.num_programs(1)
        program = i_head * per_head + i_run * tl.num_programs(1) + tl.program_id(1)
        add_to_table(
            p_partial + program.to(tl.int64) * TABLE_ROWS,
            p_scale + program,
            b_grad_bias,
            b_entry,
            m_pair,
        )
