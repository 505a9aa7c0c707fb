"""The operators in eager PyTorch: the oracle every other backend is checked against.

It reads like the formulas, at the price of time and memory. All tensors have the shapes of the
public functions in :mod:`greenmim_kernels.functional`; nothing is validated here. float64 inputs
are computed in float64, everything else in float32, and results have the input's dtype.

The mathematics: Huang et al., Green Hierarchical Vision Transformer for Masked Image Modeling,
NeurIPS 2022 (arXiv 2205.13515), section 3.2, with exact exclusion instead of a finite penalty.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax, sums and the bias table in every backend: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def with_rows(x: Tensor) -> Tensor:
    """q, k or v [B, N, heads, D], copied unless the last axis, and no other, has stride 1.

    What `empty_like` makes of the result then has its layout.
    """
    if x.shape[-1] == 1:
        return x
    others = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    fits = x.stride(-1) == 1 and not any([size > 1 and stride == 1 for size, stride in others])
    return x if fits else x.contiguous()


def group_gather(x: Tensor, token_index: Tensor) -> Tensor:
    """x [B, N, C], token_index [P, G, S] -> [B, G, S, C]; zeros where token_index is -1."""
    batch, _, channels = x.shape
    _, groups, slots = token_index.shape
    rows = token_index.clamp(min=0).long().flatten(1)  # [P, G*S]
    rows = rows[..., None].expand(batch, -1, channels)
    gathered = x.gather(1, rows).unflatten(1, (groups, slots))
    return torch.where(token_index[..., None] >= 0, gathered, 0)


def group_scatter(x: Tensor, token_index: Tensor, num_tokens: int) -> Tensor:
    """x [B, G, S, C], token_index [P, G, S] -> [B, N, C]; every token lies in exactly one slot."""
    batch, _, _, channels = x.shape
    # Padding goes to a row of its own behind the last token, which is dropped.
    rows = torch.where(token_index >= 0, token_index, num_tokens).long().flatten(1)
    rows = rows[..., None].expand(batch, -1, channels)
    scattered = x.new_zeros(batch, num_tokens + 1, channels).scatter(1, rows, x.flatten(1, 2))
    return scattered[:, :num_tokens]


def relative_position_bias(
    table: Tensor, window_id: Tensor, query_row: Tensor, key_row: Tensor
) -> Tensor:
    """table T [rows, heads] -> bias [P, G, heads, S, S]; meaningful within windows only.

    Entry (i, j) is T[query_row[i] + key_row[j]].
    """
    index = query_row[..., :, None] + key_row[..., None, :]  # [P, G, S, S]
    index = torch.where(_same_window(window_id), index, 0).long()
    return table[index].movedim(-1, 2)


def block_diagonal_attention(
    qkv: Tensor,
    table: Tensor | None,
    window_id: Tensor,
    query_row: Tensor,
    key_row: Tensor,
    num_heads: int,
    window_slots: int,
    scale: float,
) -> Tensor:
    """qkv [B, G, S, 3C] -> [B, G, S, C]: softmax over the slots of the same window of a group."""
    # Under autocast the products would run in bf16; the contract is fp32 sums everywhere.
    with _no_autocast(qkv.device.type):
        dtype = accumulation_dtype(qkv.dtype)
        valid = (window_id >= 0)[..., None]  # [P, G, S, 1]
        # Slots without a window may hold anything, even NaN. As zeros they form a window of their
        # own, whose outputs are zero and whose rows keep the softmax finite.
        x = torch.where(valid, qkv, 0).to(dtype)
        x = x.unflatten(-1, (3, num_heads, -1)).movedim(3, 0).transpose(-2, -3)
        q, k, v = x.unbind(0)  # [B, G, heads, S, D]
        scores = scale * (q @ k.transpose(-1, -2))  # [B, G, heads, S, S]
        if table is not None:
            scores = scores + relative_position_bias(table.to(dtype), window_id, query_row, key_row)
        scores = scores.masked_fill(~_same_window(window_id)[:, :, None], -torch.inf)
        out = scores.softmax(-1) @ v
        out = out.transpose(-2, -3).flatten(-2).to(qkv.dtype)
        # This `where` also keeps out a NaN in such slots of the incoming gradient.
        return torch.where(valid, out, 0)


def group_window_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    table: Tensor | None,
    pad_value: Tensor | None,
    token_index: Tensor,
    window_id: Tensor,
    query_row: Tensor,
    key_row: Tensor,
    num_heads: int,
    window_slots: int,
    scale: float,
) -> Tensor:
    """Gather, block-diagonal attention, scatter: -> [B, N, C].

    q [B, N, 3C] holds all three; or q, k, v are [B, N, heads, D] each.
    """
    qkv = q if k is None or v is None else torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], -1)
    grouped = group_gather(qkv, token_index)
    if pad_value is not None:
        grouped = torch.where((token_index >= 0)[..., None], grouped, pad_value)
    out = block_diagonal_attention(
        grouped, table, window_id, query_row, key_row, num_heads, window_slots, scale
    )
    return group_scatter(out, token_index, qkv.shape[1])


def sparse_depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor
) -> Tensor:
    """x [B, N, C], weight [C, 9], bias [C], neighbours [P, N, 9] -> [B, N, C]."""
    batch, tokens, channels = x.shape
    dtype = accumulation_dtype(x.dtype)
    rows = neighbours.clamp(min=0).long().flatten(1)  # [P, N * 9]
    rows = rows[..., None].expand(batch, -1, channels)
    around = x.to(dtype).gather(1, rows).unflatten(1, (tokens, 9))
    around = torch.where(neighbours[..., None] >= 0, around, 0)
    out = (around * weight.to(dtype).t()).sum(2)
    return (out if bias is None else out + bias.to(dtype)).to(x.dtype)


def _same_window(window_id: Tensor) -> Tensor:
    """[P, G, S] -> bool [P, G, S, S]."""
    return window_id[..., :, None] == window_id[..., None, :]


def _no_autocast(device: str) -> contextlib.AbstractContextManager:
    """Autocast switched off; not for meta tensors, which have none.

    Dynamo of torch 2.11 cannot trace a query of which devices support it.
    """
    if device == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)
