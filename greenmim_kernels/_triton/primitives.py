"""Device functions and tuples shared by the attention kernels.

Names say what a value is: ``p_`` pointer, ``o_`` offsets, ``m_`` boolean mask, ``b_`` tile in
registers, ``i_`` program or loop index. Offsets of images are int64, those within an image int32.
"""

from typing import NamedTuple

import triton
import triton.language as tl

# Integers of a call, never constants of a compiled kernel: a short last batch compiles nothing.
# They cannot be a tuple, whose elements Triton specializes all the same.
SIZES = ("batch", "num_rows", "num_groups", "num_slots", "images")


class Partition(NamedTuple):
    """Pointers to a partition; token_index is not read for gathered groups."""

    token_index: tl.tensor
    window_id: tl.tensor
    query_row: tl.tensor
    key_row: tl.tensor


class Place(NamedTuple):
    """Where a program works: a head, a group, images from `first` up to `end`."""

    head: tl.tensor
    run: tl.tensor  # number of the program among those of its head
    group: tl.tensor  # of an image
    part_group: tl.tensor  # among all P * G of the partition
    first: tl.tensor
    end: tl.tensor


class Slots(NamedTuple):
    """BLOCK slots of a group; those without a window, and beyond the group, have window -1."""

    row: tl.tensor  # in its image
    window: tl.tensor
    query_row: tl.tensor  # the bias table's row of a pair is a query's number and a key's
    key_row: tl.tensor
    m_token: tl.tensor  # in a window
    m_write: tl.tensor  # or written as zeros: padding of gathered groups, tokens in no window
    low: tl.tensor  # least and greatest window of its tokens
    high: tl.tensor
    any_row: tl.tensor  # whether any is written


@triton.jit
def locate(batch, num_groups, images, NUM_HEADS: tl.constexpr, PER_IMAGE: tl.constexpr):
    """The place of this program on the first axis of the grid: head, then group, then images."""
    i_run = tl.program_id(0) // NUM_HEADS
    i_group = i_run % num_groups
    first = (i_run // num_groups).to(tl.int64) * images
    return Place(
        tl.program_id(0) % NUM_HEADS,
        i_run,
        i_group,
        i_group + (first * num_groups if PER_IMAGE else 0),
        first,
        tl.minimum(first + images, batch),
    )


@triton.jit
def nothing(place):
    """A zero that the compiler does not know.

    A block that is loaded again at an offset of it is loaded again, and not kept in registers
    through the loop over images: 32 of a thread's, for the entries of a tile.
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
    b_window = tl.load(part.window_id + at, mask=m_slot, other=-1)
    m_token = b_window >= 0
    if GATHERED:
        b_row = tl.where(m_slot, place.group * num_slots + o_slot, -1)
    else:
        b_row = tl.load(part.token_index + at, mask=m_slot, other=-1)
    b_query_row = tl.load(part.query_row + at, mask=m_token, other=0)
    b_key_row = tl.load(part.key_row + at, mask=m_token, other=0)
    low = tl.min(tl.where(m_token, b_window, 2147483647), 0)
    high = tl.max(b_window, 0)
    any_row = tl.max(b_row, 0) >= 0
    m_write = b_row >= 0
    return Slots(b_row, b_window, b_query_row, b_key_row, m_token, m_write, low, high, any_row)


@triton.jit
def load_rows(p_x, b_row, m_row, ROW: tl.constexpr, HEAD_DIM: tl.constexpr):
    """One head of some rows: [BLOCK] -> [BLOCK, HEAD_DIM], zeros where masked."""
    o_d = tl.arange(0, HEAD_DIM)
    return tl.load(p_x + b_row[:, None] * ROW + o_d[None, :], mask=m_row[:, None], other=0.0)


@triton.jit
def store_rows(
    p_x,
    b_value,
    slots,
    ROW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GATHERED: tl.constexpr,
):
    """[BLOCK, HEAD_DIM] -> one head of some rows; zeros in those that hold no token."""
    o_d = tl.arange(0, HEAD_DIM)
    if GATHERED:
        # Beside a token that is not finite, what was computed for padding is NaN.
        b_value = tl.where(slots.m_token[:, None], b_value, 0.0)
    p_tile = p_x + slots.row[:, None] * ROW + o_d[None, :]
    tl.store(p_tile, b_value.to(p_x.dtype.element_ty), mask=slots.m_write[:, None])


@triton.jit
def pair_entries(queries, keys):
    """The table's row of each pair of slots, and which pairs share a window. [BQ, BK]"""
    m_pair = (queries.window[:, None] == keys.window[None, :]) & queries.m_token[:, None]
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
    """[M, K] @ [K, N] in fp32 sums; true fp32 products for fp32 unless PRECISION says otherwise."""
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
    HEAD_DIM: tl.constexpr,
    GATHERED: tl.constexpr,
):
    """Output, and the logarithm of the softmax's denominator."""
    C: tl.constexpr = NUM_HEADS * HEAD_DIM
    p_o = p_out + image * num_rows * C + place.head * HEAD_DIM
    # What is in no window has no sum, and is written as zeros.
    b_factor = tl.where(slots.m_token, 1.0 / b_sum, 0.0)
    store_rows(p_o, b_acc * b_factor[:, None], slots, C, HEAD_DIM, GATHERED)
    b_lse = tl.where(slots.m_token, (b_max + tl.log2(b_sum)) * 0.6931471805599453, 0.0)
    p_l = p_lse + (image * NUM_HEADS + place.head) * num_rows
    tl.store(p_l + slots.row, b_lse, mask=slots.m_write)
