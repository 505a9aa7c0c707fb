"""sparse_depthwise_conv in Triton.

Neighbours are mutual: m is at place 8 - k of the token at its place k. So the gradient of x is the
same convolution, of grad_out, with the weights turned round.
"""

import triton
import triton.language as tl

PLACES = tl.constexpr(9)


@triton.jit(do_not_specialize=["num_tokens"])
def conv_kernel(
    p_x,
    p_to,
    p_weight,  # [C, 9]
    p_bias,  # [C], or None
    p_neighbours,  # [P, N, 9]
    num_tokens,
    channels,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    FLIP: tl.constexpr,
    PER_IMAGE: tl.constexpr,
):
    """The convolution, with the weights as they are or turned round."""
    # Images are part of the first axis: the others end at 65535.
    blocks = tl.cdiv(num_tokens, BLOCK_TOKENS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    o_token = tl.program_id(0) % blocks * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    m_token = o_token < num_tokens
    p_row = p_neighbours + ((image * num_tokens if PER_IMAGE else 0) + o_token) * PLACES
    for first in range(0, channels, BLOCK_CHANNELS):
        o_channel = first + tl.arange(0, BLOCK_CHANNELS)
        m_channel = o_channel < channels
        b_out = tl.zeros([BLOCK_TOKENS, BLOCK_CHANNELS], tl.float32)
        for k in tl.static_range(PLACES):
            b_near = tl.load(p_row + k, mask=m_token, other=-1)
            p_near = p_x + (image * num_tokens + b_near)[:, None] * channels + o_channel[None, :]
            m_near = (b_near >= 0)[:, None] & m_channel[None, :]
            b_x = tl.load(p_near, mask=m_near, other=0.0).to(tl.float32)
            p_place = p_weight + o_channel.to(tl.int64) * PLACES + (PLACES - 1 - k if FLIP else k)
            b_out += b_x * tl.load(p_place, mask=m_channel, other=0.0)[None, :]
        if p_bias is not None:
            b_out += tl.load(p_bias + o_channel, mask=m_channel, other=0.0)[None, :]
        p_own = p_to + (image * num_tokens + o_token)[:, None] * channels + o_channel[None, :]
        m_own = m_token[:, None] & m_channel[None, :]
        tl.store(p_own, b_out.to(p_to.dtype.element_ty), mask=m_own)


@triton.jit(do_not_specialize=["rows", "num_tokens", "blocks"])
def conv_sums_kernel(
    p_x,
    p_grad_out,
    p_neighbours,  # [P, N, 9]
    p_sums,  # fp32 [programs, 10, C]: for the weights' nine places, and for the bias
    rows,  # B * N
    num_tokens,
    channels,
    blocks,  # of tokens, of a program
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    PER_IMAGE: tl.constexpr,
):
    """A program's sums for the gradients of weight and bias."""
    o_place = tl.arange(0, 16)[:, None]
    is_bias = o_place == PLACES
    o_channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    m_channel = (o_channel < channels)[None, :]
    # The bias takes what is at the middle place, the token itself, times one.
    o_near = tl.where(is_bias, PLACES // 2, o_place)
    b_sum = tl.zeros([16, BLOCK_TOKENS, BLOCK_CHANNELS], tl.float32)
    start = tl.program_id(0).to(tl.int64) * blocks * BLOCK_TOKENS
    for i in range(0, blocks):
        o_row = start + i * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        m_row = o_row < rows
        first = o_row // num_tokens * num_tokens  # of the image
        o_plan = (o_row if PER_IMAGE else o_row - first) * PLACES
        m_near = m_row[None, :] & (o_place <= PLACES)
        b_near = tl.load(p_neighbours + o_plan[None, :] + o_near, mask=m_near, other=-1)
        p_near = p_grad_out + (first[None, :] + b_near)[:, :, None] * channels
        m_grad = (b_near >= 0)[:, :, None] & m_channel[None, :, :]
        b_grad = tl.load(p_near + o_channel[None, None, :], mask=m_grad, other=0.0)
        p_own = p_x + o_row[:, None] * channels + o_channel[None, :]
        b_x = tl.load(p_own, mask=m_row[:, None] & m_channel, other=0.0).to(tl.float32)
        b_sum += tl.where(is_bias[:, :, None], 1.0, b_x[None, :, :]) * b_grad.to(tl.float32)
    # What lies at place k has the weight of place 8 - k.
    o_to = tl.where(is_bias, PLACES, PLACES - 1 - o_place)
    p_to = p_sums + tl.program_id(0).to(tl.int64) * (PLACES + 1) * channels
    p_to += o_to.to(tl.int64) * channels + o_channel[None, :]
    tl.store(p_to, tl.sum(b_sum, 1), mask=(o_place <= PLACES) & m_channel)
