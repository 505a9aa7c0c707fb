"""Device functions shared by the forward and backward kernels.

Names say what a value is: ``p_`` pointer, ``o_`` offsets, ``m_`` boolean mask, ``b_`` tile in
registers, ``i_`` program or loop index. Offsets of images are int64, those within an image int32.
"""

import triton
import triton.language as tl


@triton.jit
def load_slots(
    p_rows,
    p_window,
    p_coords,
    group,  # index of the group among all P * G
    first,  # first slot
    num_slots,
    COORD_WIDTH: tl.constexpr,
    GATHERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK slots of a group: row of the token in its image, window, position in the bias table.

    GATHERED: the tensors hold groups, and the row is the slot itself (`group_row` is added later).
    Slots beyond the group count as padding: window -1.
    """
    o_slot = first + tl.arange(0, BLOCK)
    m_slot = o_slot < num_slots
    at = group * num_slots + o_slot
    b_window = tl.load(p_window + at, mask=m_slot, other=-1)
    m_token = b_window >= 0
    if GATHERED:
        b_row = o_slot
    else:
        b_row = tl.load(p_rows + at, mask=m_token, other=0)
    b_h = tl.load(p_coords + 2 * at, mask=m_token, other=0)
    b_w = tl.load(p_coords + 2 * at + 1, mask=m_token, other=0)
    return b_row, b_window, b_h * COORD_WIDTH + b_w, m_slot, m_token


@triton.jit
def load_rows(p_x, b_row, m_row, ROW: tl.constexpr, HEAD_DIM: tl.constexpr):
    """One head of some rows: [BLOCK] -> [BLOCK, HEAD_DIM], zeros where masked."""
    o_d = tl.arange(0, HEAD_DIM)
    return tl.load(p_x + b_row[:, None] * ROW + o_d[None, :], mask=m_row[:, None], other=0.0)


@triton.jit
def store_rows(
    p_x,
    b_value,
    b_row,
    m_row,
    m_token,
    ROW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GATHERED: tl.constexpr,
):
    """[BLOCK, HEAD_DIM] -> one head of some rows; zeros in those that hold no token."""
    o_d = tl.arange(0, HEAD_DIM)
    if GATHERED:
        # Beside a token that is not finite, what was computed for padding is NaN.
        b_value = tl.where(m_token[:, None], b_value, 0.0)
    p_tile = p_x + b_row[:, None] * ROW + o_d[None, :]
    tl.store(p_tile, b_value.to(p_x.dtype.element_ty), mask=m_row[:, None])


@triton.jit
def bias_tile(
    p_table,
    i_head,
    b_window_q,
    b_window_k,
    b_position_q,
    b_position_k,
    OFFSET: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
):
    """Bias times log2(e) where query and key share a window, -inf elsewhere. [BQ, BK]

    Also the table's row of each pair, and which pairs share a window.
    """
    m_pair = (b_window_q[:, None] == b_window_k[None, :]) & (b_window_q >= 0)[:, None]
    b_entry = b_position_q[:, None] - b_position_k[None, :] + OFFSET
    if HAS_TABLE:
        b_bias = tl.load(p_table + b_entry * NUM_HEADS + i_head, mask=m_pair, other=0.0)
        b_bias = tl.where(m_pair, b_bias * 1.4426950408889634, float("-inf"))
    else:
        b_bias = tl.where(m_pair, 0.0, float("-inf"))
    return b_bias, b_entry, m_pair


@triton.jit
def product(b_left, b_right, PRECISION: tl.constexpr):
    """[M, K] @ [K, N] in fp32 sums; true fp32 products for fp32 unless PRECISION says otherwise."""
    return tl.dot(b_left, b_right, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def add_to_table(p_partial, p_scale, b_grad, b_entry, m_pair):
    """Add a tile of the bias' gradient to this program's own row of sums, the same bits every time.

    Pairs at the same offset meet in one entry in no given order, and float sums would depend on it.
    So the tile is scaled by a power of two to 41 bits and added as integers, which do not;
    `p_scale` takes the power back (NaN, where the tile is not finite).
    """
    b_grad = tl.where(m_pair, b_grad, 0.0)
    largest = tl.max(tl.max(tl.abs(b_grad), 1), 0)
    # A NaN may lose a maximum; a sum never forgets it.
    total = tl.sum(tl.sum(b_grad * 0.0, 1), 0)
    exponent = ((largest.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    exponent = tl.maximum(exponent, -80)
    up = ((40 - exponent + 127) << 23).to(tl.float32, bitcast=True)
    down = ((exponent - 40 + 127) << 23).to(tl.float32, bitcast=True)
    finite = total == 0.0
    fixed = tl.where(finite, b_grad * up, 0.0).to(tl.int64)
    tl.atomic_add(p_partial + b_entry, fixed, mask=m_pair, sem="relaxed")
    tl.store(p_scale, tl.where(finite, down, float("nan")))
