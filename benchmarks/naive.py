"""The path that everybody has: grouped masked attention in eager PyTorch.

Gather the groups, dense scores, dense bias, mask, softmax, scatter: what the published method
describes, written with ordinary tensor operations. Frozen: a peer that is tuned along with what it
is compared to is no peer. What does not change within a step (indices, mask) is prepared once and
left out of the timing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from greenmim_kernels import GroupPartition


class NaiveGroupAttention:
    """Callable with the arguments of ``group_window_attention``, for one mask per batch."""

    def __init__(self, part: GroupPartition) -> None:
        if part.token_index.shape[0] != 1:
            raise ValueError("the naive path takes one mask per batch")
        index = part.token_index[0].long()  # [G, S]
        window = part.window_id[0]
        row = (part.query_row[0][:, :, None] + part.key_row[0][:, None]).long()
        same = window[:, :, None] == window[:, None]
        slots = torch.arange(index.numel(), device=index.device)
        kept = index.flatten() >= 0
        self.groups, self.slots = index.shape
        self.gather_index = index.clamp(min=0).flatten()
        self.bias_index = torch.where(same, row, 0).flatten()
        self.excluded = ~same[:, None]  # [G, 1, S, S]
        self.scatter_index = torch.empty(part.num_tokens, dtype=torch.long, device=index.device)
        self.scatter_index[index.flatten()[kept]] = slots[kept]

    def __call__(
        self, qkv: Tensor, table: Tensor | None, part: GroupPartition, num_heads: int
    ) -> Tensor:
        batch, _, channels = qkv.shape
        groups, slots, head_dim = self.groups, self.slots, channels // 3 // num_heads
        x = qkv[:, self.gather_index]
        x = x.view(batch, groups, slots, 3, num_heads, head_dim).permute(3, 0, 1, 4, 2, 5)
        q, k, v = x.unbind(0)  # [B, G, heads, S, D]
        scores = (q * head_dim**-0.5) @ k.transpose(-1, -2)
        if table is not None:
            bias = table[self.bias_index].view(groups, slots, slots, num_heads)
            scores = scores + bias.permute(0, 3, 1, 2)
        scores = scores.masked_fill(self.excluded, -torch.inf)
        out = scores.softmax(-1) @ v
        out = out.transpose(2, 3).reshape(batch, groups * slots, num_heads * head_dim)
        return out[:, self.scatter_index]
