"""group_gather and group_scatter in Triton: copies of whole rows."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_slots", "num_tokens"])
def copy_rows_kernel(
    p_from,
    p_to,
    p_index,  # token_index [P, G * S]
    num_slots,  # G * S
    num_tokens,
    channels,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    SCATTER: tl.constexpr,
    PER_IMAGE: tl.constexpr,
):
    """Gather tokens into slots (zeros in padding), or scatter slots back (padding is not read)."""
    # Images are part of the first axis: the others end at 65535.
    blocks = tl.cdiv(num_slots, BLOCK_SLOTS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    o_slot = tl.program_id(0) % blocks * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    m_slot = o_slot < num_slots
    p_row = p_index + o_slot + (image * num_slots if PER_IMAGE else 0)
    b_token = tl.load(p_row, mask=m_slot, other=-1)
    m_token = b_token >= 0
    p_token = (image * num_tokens + b_token)[:, None] * channels
    p_slot = (image * num_slots + o_slot)[:, None] * channels
    for first in range(0, channels, BLOCK_CHANNELS):
        o_channel = first + tl.arange(0, BLOCK_CHANNELS)
        m_channel = (o_channel < channels)[None, :]
        m_copy = m_token[:, None] & m_channel
        if SCATTER:
            b_x = tl.load(p_from + p_slot + o_channel[None, :], mask=m_copy)
            tl.store(p_to + p_token + o_channel[None, :], b_x, mask=m_copy)
        else:
            b_x = tl.load(p_from + p_token + o_channel[None, :], mask=m_copy, other=0.0)
            tl.store(p_to + p_slot + o_channel[None, :], b_x, mask=m_slot[:, None] & m_channel)
