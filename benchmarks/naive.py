"""The path that everybody has: grouped masked attention in eager PyTorch.

Gather the groups, dense scores, dense bias, mask, softmax, scatter: what the published method
describes, written with ordinary tensor operations. Frozen: a peer that is tuned along with what it
is compared to is no peer. What does not change within a step (indices, mask) is prepared once and
left out of the timing. `SpreadGroupAttention` differs in what is slow on a GPU alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from greenmim_kernels import GroupPartition


class NaiveGroupAttention:
    """Callable with the arguments of ``group_window_attention``, for one mask per batch."""

    @staticmethod
    def rows(x: Tensor, index: Tensor) -> Tensor:
        return indexed(x, index)

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
        x = self.rows(qkv, self.gather_index)
        x = x.view(batch, groups, slots, 3, num_heads, head_dim).permute(3, 0, 1, 4, 2, 5)
        q, k, v = x.unbind(0)  # [B, G, heads, S, D]
        scores = (q * head_dim**-0.5) @ k.transpose(-1, -2)
        if table is not None:
            bias = table[self.bias_index].view(groups, slots, slots, num_heads)
            scores = scores + bias.permute(0, 3, 1, 2)
        scores = scores.masked_fill(self.excluded, -torch.inf)
        out = scores.softmax(-1) @ v
        out = out.transpose(2, 3).reshape(batch, groups * slots, num_heads * head_dim)
        return self.rows(out, self.scatter_index)


def indexed(x: Tensor, index: Tensor) -> Tensor:
    """Rows of every image; on a GPU the backward pass sorts them first."""
    return x[:, index]


def selected(x: Tensor, index: Tensor) -> Tensor:
    """The same by `index_select`, whose backward pass does not sort."""
    return x.index_select(1, index.flatten()).unflatten(1, index.shape)


class SpreadGroupAttention(NaiveGroupAttention):
    """The same, and excluded pairs, whose bias is masked, take all rows of the table in turn.

    In the other they all take row 0, and on a GPU the backward pass of indexing adds what has the
    same row one after the other.
    """

    rows = staticmethod(selected)

    def __init__(self, part: GroupPartition) -> None:
        super().__init__(part)
        used = part.token_index[0] >= 0  # absent tokens are no window's, and masked for nobody
        taken = (~self.excluded[:, 0] & used[:, :, None]).flatten()
        turn = torch.arange(len(taken), device=taken.device) % part.table_rows
        self.bias_index = torch.where(taken, self.bias_index, turn)
