"""Blocks and layers of other libraries whose rolling, padding and cutting into windows is known.

Their attention gets the tokens as they lie, and a partition: nothing is rolled, padded or copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import (
    Fused,
    Swin,
    asked_maps,
    asks_more,
    attend_in,
    bias_of_mlp,
    of_length,
    takes,
)
from .grids import GridPartition, grid_partition


class FusedTimmBlock(Fused):
    """timm's Swin and SwinV2: rolled, then padded."""

    def _attn(self, x: Tensor) -> Tensor:
        part = grid_partition(
            x.shape[1:3], self.window_size, self.shift_size, self.attn.window_size, x.device
        )
        if not takes(self.attn, x, part):
            return super()._attn(x)
        return self.attn(x.flatten(1, 2), part).view(x.shape)


class FusedHuggingFaceSwinLayer(Fused):
    """transformers' SwinLayer: padded, then rolled."""

    def forward(self, hidden_states, input_dimensions, *more, always_partition=False, **options):
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        asked = (*more, asked_maps(self.attention, options))
        part = _of_layer(self, self.attention, hidden_states, input_dimensions, asked)
        if part is None:
            options["always_partition"] = always_partition
            return super().forward(hidden_states, input_dimensions, *more, **options)
        x, maps = self.attention(self.layernorm_before(hidden_states), part, **options)
        x = hidden_states + self.drop_path(self.dropout(x))
        return x + self.dropout(self.mlp(self.layernorm_after(x))), maps


class FusedHuggingFacePreNormLayer(Fused):
    """Before transformers 5, Donut's and MaskFormer's: the same, with an MLP in two modules."""

    def forward(self, hidden_states, input_dimensions, *more, **options):
        if hasattr(self, "set_shift_and_window_size"):
            self.set_shift_and_window_size(input_dimensions)
        attention, asked = self.attention.self, (*more, *options.values())
        part = _of_layer(self, attention, hidden_states, input_dimensions, asked)
        if part is None:
            return super().forward(hidden_states, input_dimensions, *more, **options)
        (x,) = self.attention(self.layernorm_before(hidden_states), part)
        x = hidden_states + self.drop_path(x)
        return (x + self.output(self.intermediate(self.layernorm_after(x))),)


class FusedHuggingFaceSwinV2Layer(Fused):
    """transformers' Swinv2Layer, with its norms behind the branches."""

    def forward(self, hidden_states, input_dimensions, *more, **options):
        attention, asked = self.attention.self, (*more, *options.values())
        part = _of_layer(self, attention, hidden_states, input_dimensions, asked)
        if part is None:
            return super().forward(hidden_states, input_dimensions, *more, **options)
        (x,) = self.attention(hidden_states, part)
        x = hidden_states + self.drop_path(self.layernorm_before(x))
        y = self.output(self.intermediate(x))
        return (x + self.drop_path(self.layernorm_after(y)),)


def _of_layer(
    layer: nn.Module, attention: nn.Module, x: Tensor, grid: tuple[int, int], asked: tuple
) -> GridPartition | None:
    """None if the layer's own code is to run."""
    window, shift = (layer.window_size,) * 2, (layer.shift_size,) * 2
    if window != tuple(attention.reader.window(attention)) or asks_more(attention, *asked):
        return None
    part = grid_partition(grid, window, shift, window, x.device, pads_first=True)
    return part if takes(attention, x, part) else None


class FusedMonaiBlock(Fused):
    """MONAI's and Video-Swin's: padded, then rolled; on a smaller grid the window is the grid."""

    def forward_part1(self, x: Tensor, mask_matrix: Tensor | None) -> Tensor:
        part = _of_block(self, x)
        if not takes(self.attn, x, part):
            return super().forward_part1(x, mask_matrix)
        return self.attn(self.norm1(x).flatten(1, -2), part).view(x.shape)


def _of_block(block: nn.Module, x: Tensor) -> GridPartition:
    window, shift = window_and_shift(x.shape[1:-1], block.window_size, block.shift_size)
    table_window = block.attn.window_size
    return grid_partition(x.shape[1:-1], window, shift, table_window, x.device, pads_first=True)


def window_and_shift(
    grid: Sequence[int], window: Sequence[int], shift: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Along an axis of the grid that the window covers, it is that axis and is not shifted."""
    axes = list(zip(grid, window, shift, strict=True))
    return (
        tuple([min(side, of_window) for side, of_window, _ in axes]),
        tuple([0 if side <= of_window else by for side, of_window, by in axes]),
    )


class FusedMonaiLayer(Fused):
    """MONAI's BasicLayer, which makes a mask for its blocks; fused ones do not read it."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.movedim(1, -1)
        if not all([takes(block.attn, y, _of_block(block, y)) for block in self.blocks]):
            return super().forward(x)
        for block in self.blocks:
            y = block(y, None)
        if self.downsample is not None:
            y = self.downsample(y)
        return y.movedim(-1, 1)


class Torchvision(Swin):
    def output(self, m, x: Tensor) -> Tensor:
        return F.dropout(m.proj(x), p=m.dropout, training=m.training)

    def scale(self, m) -> float:
        return self.heads(m)[1] ** -0.5

    def dropout(self, m) -> float:
        return m.attention_dropout


class TorchvisionV2(Torchvision):
    def qkv_and_bias(self, m, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        bias = m.qkv.bias
        if bias is not None:  # that of the keys counts for nothing
            q, k, v = bias.chunk(3)
            bias = torch.cat((q, torch.zeros_like(k), v))
        qkv = F.linear(x, m.qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, *self.heads(m))).unbind(-3)
        return (of_length(q, m.logit_scale), of_length(k), v), bias

    def table(self, m) -> Tensor:
        return bias_of_mlp(m.cpb_mlp(m.relative_coords_table), m.num_heads)

    def scale(self, m) -> float:
        return 1.0


class FusedTorchvisionAttention(Fused):
    """torchvision's ShiftedWindowAttention, [B, H, W, C]: padded, then rolled."""

    reader = Torchvision()

    def forward(self, x: Tensor) -> Tensor:
        grid, window = x.shape[1:3], self.window_size
        _, shift = window_and_shift(grid, window, self.shift_size)
        part = grid_partition(grid, window, shift, window, x.device, pads_first=True)
        if not takes(self, x, part):
            return super().forward(x)
        return attend_in(self, x.flatten(1, 2), part, part.pads).view(x.shape)


class FusedTorchvisionV2Attention(FusedTorchvisionAttention):
    reader = TorchvisionV2()
