"""Modules built on the operators."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .functional import group_window_attention
from .partition import GroupPartition, table_rows, window_axes


class GroupWindowAttention(nn.Module):
    """Swin's window attention on visible tokens, with Swin's parameter names.

    The state dict is that of Swin's ``WindowAttention`` (Liu et al., ICCV 2021) without its
    ``relative_position_index`` buffer: ``qkv``, ``proj``, ``relative_position_bias_table``.

    Args:
        dim: channels C.
        window_size: M, or one number per axis, in tokens.
        num_heads: number of heads; divides `dim`.
        qkv_bias: whether q, k and v have a bias.

    Raises:
        TypeError: `window_size` is neither an integer nor 1 to 3 of them.
        ValueError: `num_heads` does not divide `dim`, or `window_size` is below 1.
    """

    def __init__(
        self, dim: int, window_size: int | tuple[int, ...], num_heads: int, qkv_bias: bool = True
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim = {dim}, got {num_heads}")
        self.window_size = window_axes(window_size)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(
            torch.empty(table_rows(self.window_size), num_heads)
        )
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, part: GroupPartition) -> Tensor:
        """Attention in the windows of a partition.

        Args:
            x: floating point [B, N, C], visible tokens in row-major order of their grid.
            part: a partition with the layer's window size, on the device of `x`.

        Returns:
            [B, N, C].

        Raises:
            ValueError: the partition has another window size, or does not fit `x`.
            RuntimeError: the backend in force cannot be used here.
        """
        if part.window_size != self.window_size:
            raise ValueError(
                f"the layer has windows of {self.window_size}, the partition of"
                f" {part.window_size}; make the partition with the layer's window_size"
            )
        out = group_window_attention(
            self.qkv(x), self.relative_position_bias_table, part, self.num_heads
        )
        return self.proj(out)
