"""Device functions and tuples shared by the attention kernels.

Names say what a value is: ``p_`` pointer, ``o_`` offsets, ``m_`` boolean mask, ``b_`` tile in
registers, ``i_`` program or loop index. Offsets of images are int64, those within an image int32.
"""

from typing import NamedTuple

import triton
import triton.language as tl

# Integers of a call, never constants of a compiled kernel: a short last batch compiles nothing.
# They cannot be a tuple, whose elements Triton specializes all the same: `Rows` is one, so q, k and
# v apart compile again where a stride becomes, or stops being, 1 or a multiple of 16.
SIZES = ("batch", "num_rows", "num_groups", "num_slots", "images")


class Partition(NamedTuple):
    """Pointers to a partition; token_index is not read for gathered groups."""

    token_index: tl.tensor
    window_id: tl.tensor
    query_row: tl.tensor
    key_row: tl.tensor


class Rows(NamedTuple):
    """q, k, v or a gradient of one, [batch, rows, heads, DIM].

    Strides `image`, `row`, `head` are in elements. They are unused when q, k and v are packed into
    one tensor; all three then point to it.
    """

    p: tl.tensor
    image: tl.tensor
    row: tl.tensor
    head: tl.tensor


class HeadRows(NamedTuple):
    """One head of the rows of one image."""

    p: tl.tensor
    row: tl.tensor  # elements from one row to the next


class Place(NamedTuple):
    """What a program works on: a head, a group, and images `first` to `end` - 1."""

    head: tl.tensor
    group: tl.tensor  # of an image
    part_group: tl.tensor  # among all P * G of the partition
    first: tl.tensor
    end: tl.tensor


class Slots(NamedTuple):
    """BLOCK slots of a group."""

    row: tl.tensor  # in its image; -1 where there is none
    query_window: tl.tensor  # of a token; -2 where there is none
    key_window: tl.tensor  # of a token or of padding that attends; -1 where there is none
    query_row: tl.tensor  # a pair's row in the bias table is query_row[i] + key_row[j]
    key_row: tl.tensor
    m_token: tl.tensor  # a token in a window: its row is read
    # is written: as m_token, or zeros (padding of gathered groups, tokens in no window)
    m_write: tl.tensor
    low: tl.tensor  # least and greatest window
    high: tl.tensor
    any_row: tl.tensor  # whether any slot is written


@triton.jit
def locate(batch, num_groups, images, NUM_HEADS: tl.constexpr, PER_IMAGE: tl.constexpr, blocks=1):
    """The place of this program on the first axis of the grid: head, then block of a group, group
    and images, so that programs that read the same rows run side by side."""
    i_run = tl.program_id(0) // NUM_HEADS // blocks
    i_group = i_run % num_groups
    first = (i_run // num_groups).to(tl.int64) * images
    return Place(
        tl.program_id(0) % NUM_HEADS,
        i_group,
        i_group + (first * num_groups if PER_IMAGE else 0),
        first,
        tl.minimum(first + images, batch),
    )


@triton.jit
def number_of(place, NUM_HEADS: tl.constexpr):
    """This program's index, with all programs of a head consecutive."""
    return place.head * (tl.num_programs(0) // NUM_HEADS) + tl.program_id(0) // NUM_HEADS


@triton.jit
def nothing(place):
    """A zero that the compiler does not know.

    Loading a block again at this offset really reloads it; otherwise its entries would stay in
    registers, 32 per thread, through the loop over images.
    """
    return tl.minimum(place.end - place.first, 0).to(tl.int32)


@triton.jit
def load_block(
    part,
    place,
    first,  # first slot
    num_slots,
    GATHERED: tl.constexpr,  # the tensors hold groups, and the row is the slot itself
    BLOCK: tl.constexpr,
):
    """BLOCK slots of this program's group."""
    o_slot = first + tl.arange(0, BLOCK)
    m_slot = o_slot < num_slots
    at = place.part_group * num_slots + o_slot
    b_key_window = tl.load(part.window_id + at, mask=m_slot, other=-1)
    m_key = b_key_window >= 0
    if GATHERED:
        b_row = tl.where(m_slot, place.group * num_slots + o_slot, -1)
    else:
        b_row = tl.load(part.token_index + at, mask=m_slot, other=-1)
    b_query_row = tl.load(part.query_row + at, mask=m_key, other=0)
    b_key_row = tl.load(part.key_row + at, mask=m_key, other=0)
    m_write = b_row >= 0
    m_token = m_key & m_write
    b_query_window = tl.where(m_token, b_key_window, -2)
    low = tl.min(tl.where(m_key, b_key_window, 2147483647), 0)
    high = tl.max(b_key_window, 0)
    return Slots(
        b_row, b_query_window, b_key_window, b_query_row, b_key_row, m_token, m_write, low, high,
        tl.max(b_row, 0) >= 0,
    )  # fmt: skip


@triton.jit
def head_rows(
    x,
    image,
    place,
    num_rows,
    WHICH: tl.constexpr,  # of q, k and v
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PACKED: tl.constexpr,
):
    """This program's head of an image of q, k, v or a gradient."""
    C: tl.constexpr = NUM_HEADS * DIM
    if PACKED:
        p_head = x.p + image * num_rows * (3 * C) + place.head * DIM + WHICH * C
        found = HeadRows(p_head, tl.full([], 3 * C, tl.int32))
    else:
        p_head = x.p + image * x.image + place.head.to(tl.int64) * x.head
        found = HeadRows(p_head, x.row)
    return found


@triton.jit
def out_rows(p_x, image, place, num_rows, NUM_HEADS: tl.constexpr, DIM: tl.constexpr):
    """This program's head of an image of the output or its gradient, [batch, rows, C]."""
    C: tl.constexpr = NUM_HEADS * DIM
    return HeadRows(p_x + image * num_rows * C + place.head * DIM, tl.full([], C, tl.int32))


@triton.jit
def load_rows(x, slots, DIM: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The rows of tokens: [BLOCK] -> [BLOCK, HEAD_DIM], zeros elsewhere and beyond DIM."""
    o_d = tl.arange(0, HEAD_DIM)
    m_x = slots.m_token[:, None]
    if DIM < HEAD_DIM:
        m_x = m_x & (o_d < DIM)[None, :]
    return tl.load(x.p + slots.row[:, None] * x.row + o_d[None, :], mask=m_x, other=0.0)


@triton.jit
def is_padding(slots):
    """Padding that attends: in a window, but not a token."""
    return slots.key_window > slots.query_window + 1


@triton.jit
def load_key_rows(
    x,
    p_pad,  # [3C], or None
    place,
    slots,
    WHICH: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """As `load_rows`, for k or v, with p_pad's value in padding that attends."""
    b_x = load_rows(x, slots, DIM, HEAD_DIM)
    if p_pad is not None:
        o_d = tl.arange(0, HEAD_DIM)
        p_value = p_pad + (WHICH * NUM_HEADS + place.head) * DIM + o_d
        b_pad = tl.load(p_value, mask=o_d < DIM, other=0.0)
        b_x = tl.where(is_padding(slots)[:, None], b_pad[None, :], b_x)
    return b_x


@triton.jit
def store_rows(
    x,
    b_value,
    slots,
    DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GATHERED: tl.constexpr,
):
    """[BLOCK, HEAD_DIM] -> the rows of tokens; zeros in those that hold no token."""
    o_d = tl.arange(0, HEAD_DIM)
    if GATHERED:
        # Beside a token that is not finite, what was computed for padding is NaN.
        b_value = tl.where(slots.m_token[:, None], b_value, 0.0)
    m_x = slots.m_write[:, None]
    if DIM < HEAD_DIM:
        m_x = m_x & (o_d < DIM)[None, :]
    p_tile = x.p + slots.row[:, None] * x.row + o_d[None, :]
    tl.store(p_tile, b_value.to(x.p.dtype.element_ty), mask=m_x)


@triton.jit
def store_padding(
    p_partial_pad,  # fp32 [programs, 2, DIM]
    program,
    b_grad_k,  # [BLOCK, HEAD_DIM], zeros but for padding
    b_grad_v,
    DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """This program's sums for k and v of the padding."""
    o_d = tl.arange(0, HEAD_DIM)
    p_row = p_partial_pad + program.to(tl.int64) * (2 * DIM) + o_d
    tl.store(p_row, tl.sum(b_grad_k, 0), mask=o_d < DIM)
    tl.store(p_row + DIM, tl.sum(b_grad_v, 0), mask=o_d < DIM)


@triton.jit
def pair_entries(queries, keys):
    """The table's row of each pair of slots, and which pairs share a window. [BQ, BK]"""
    m_pair = queries.query_window[:, None] == keys.key_window[None, :]
    return queries.query_row[:, None] + keys.key_row[None, :], m_pair


@triton.jit
def bias_tile(
    p_table,
    i_head,
    queries,
    keys,
    NUM_HEADS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
):
    """Bias times log2(e) where query and key share a window, -inf elsewhere. [BQ, BK]"""
    b_entry, m_pair = pair_entries(queries, keys)
    if HAS_TABLE:
        b_bias = tl.load(p_table + b_entry * NUM_HEADS + i_head, mask=m_pair, other=0.0)
        b_bias = tl.where(m_pair, b_bias * 1.4426950408889634, float("-inf"))
    else:
        b_bias = tl.where(m_pair, 0.0, float("-inf"))
    return b_bias


@triton.jit
def product(b_left, b_right, PRECISION: tl.constexpr):
    """[M, K] @ [K, N], accumulated in fp32; fp32 inputs are not rounded to TF32."""
    return tl.dot(b_left, b_right, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def write_forward(
    p_out,
    p_lse,
    image,
    place,
    slots,
    num_rows,
    b_acc,  # sum of exp2(score - max) v
    b_max,
    b_sum,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GATHERED: tl.constexpr,
):
    """Output, and the logarithm of the softmax's denominator."""
    # Slots in no window have no sum, and are written as zeros.
    b_factor = tl.where(slots.m_token, 1.0 / b_sum, 0.0)
    out = out_rows(p_out, image, place, num_rows, NUM_HEADS, DIM)
    store_rows(out, b_acc * b_factor[:, None], slots, DIM, HEAD_DIM, GATHERED)
    b_lse = tl.where(slots.m_token, (b_max + tl.log2(b_sum)) * 0.6931471805599453, 0.0)
    p_l = p_lse + (image * NUM_HEADS + place.head) * num_rows
    tl.store(p_l + slots.row, b_lse, mask=slots.m_write)
