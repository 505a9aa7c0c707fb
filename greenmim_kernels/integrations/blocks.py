"""Blocks and layers of other libraries whose rolling, padding and cutting into windows is known.

Their attention gets the tokens as they lie, and a partition: nothing is rolled, padded or copied.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .attention import (
    Fused,
    asked_maps,
    asks_more,
    attend_in,
    may_take,
    takes,
)
from .grids import GridPartition, grid_partition
from .readers import Torchvision, TorchvisionV2, has_hooks


def _part_of(
    attention: nn.Module,
    x: Tensor,
    grid: Sequence[int],
    window: Sequence[int],
    shift: Sequence[int],
    pads_first: bool,
) -> GridPartition | None:
    """A partition of the grid; None, and says why, if the kernels do not do the call."""
    table_window = attention.reader.window(attention)
    part = grid_partition(grid, window, shift, table_window, x.device, pads_first=pads_first)
    return part if takes(attention, x, part) else None


def _is_taken(attention: nn.Module, x: Tensor) -> bool:
    """Whether it is fused still, with Swin's index: another one may have been loaded into it."""
    has_plain_index = isinstance(attention, Fused) and attention.unfused[2]
    return has_plain_index and may_take(attention, x)


def window_and_shift(
    grid: Sequence[int], window: Sequence[int], shift: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Along an axis of the grid that the window covers, it is that axis and is not shifted."""
    axes = list(zip(grid, window, shift, strict=True))
    return (
        tuple([min(side, of_window) for side, of_window, _ in axes]),
        tuple([0 if side <= of_window else by for side, of_window, by in axes]),
    )


class FusedTimmBlock(Fused):
    """timm's Swin and SwinV2: rolled, then padded."""

    def _attn(self, x: Tensor) -> Tensor:
        part = None
        if _is_taken(self.attn, x):
            part = _part_of(self.attn, x, x.shape[1:3], self.window_size, self.shift_size, False)
        if part is None:
            return super()._attn(x)  # type: ignore[misc]  # the other base has it
        return self.attn(x.flatten(1, 2), part).view(x.shape)


# --- Microsoft's Swin and SwinV2, and copies of them: rolled; the window divides the grid ---------


class FusedSwinBlock(Fused):
    """SwinTransformerBlock, ``forward(x)``, or ``forward(x, x_size)`` as in SwinIR."""

    def forward(self, x: Tensor, *size, **options) -> Tensor:
        part = _part_of_swin_block(self, x, *size, *options.values())
        if part is None:
            return super().forward(x, *size, **options)
        x = x + self.drop_path(self.attn(self.norm1(x), part))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class FusedSwinV2Block(Fused):
    """That of SwinV2, with its norms behind the branches."""

    def forward(self, x: Tensor, *size, **options) -> Tensor:
        part = _part_of_swin_block(self, x, *size, *options.values())
        if part is None:
            return super().forward(x, *size, **options)
        x = x + self.drop_path(self.norm1(self.attn(x, part)))
        return x + self.drop_path(self.norm2(self.mlp(x)))


def _part_of_swin_block(
    block: nn.Module, x: Tensor, grid: tuple[int, int] | None = None, *more: object
) -> GridPartition | None:
    if more or not _is_taken(block.attn, x):
        return None
    high, wide = block.input_resolution if grid is None else grid
    window, shift = (block.window_size,) * 2, (block.shift_size,) * 2
    is_cut = high % window[0] == wide % window[0] == 0 and high * wide == x.shape[1]
    if not is_cut or window != tuple(block.attn.reader.window(block.attn)):
        return None
    return _part_of(block.attn, x, (high, wide), window, shift, False)


# --- transformers: padded, then rolled ----------------------------------------------------------


class FusedHuggingFaceSwinLayer(Fused):
    """SwinLayer."""

    def forward(self, hidden_states, input_dimensions, always_partition=False, **options):
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        maps = asked_maps(self.attention, options)
        part = _part_of_layer(self, self.attention, hidden_states, input_dimensions, maps)
        if part is None:
            return super().forward(hidden_states, input_dimensions, always_partition, **options)
        x, maps = self.attention(self.layernorm_before(hidden_states), part, **options)
        x = hidden_states + self.drop_path(self.dropout(x))
        return x + self.dropout(self.mlp(self.layernorm_after(x))), maps


class FusedHuggingFacePreNormLayer(Fused):
    """SwinLayer before transformers 5, Donut's and MaskFormer's, with an MLP in two modules."""

    def forward(self, hidden_states, input_dimensions, *more, **options):
        asked, attention = (*more, *options.values()), self.attention.self
        if hasattr(self, "set_shift_and_window_size") and not any(asked):
            self.set_shift_and_window_size(input_dimensions)
        part = _part_of_layer(self, attention, hidden_states, input_dimensions, *asked)
        if part is None:
            return super().forward(hidden_states, input_dimensions, *more, **options)
        (x,) = self.attention(self.layernorm_before(hidden_states), part)
        x = hidden_states + self.drop_path(x)
        return (x + self.output(self.intermediate(self.layernorm_after(x))),)


class FusedHuggingFaceSwinV2Layer(Fused):
    """Swinv2Layer, with its norms behind the branches."""

    def forward(self, hidden_states, input_dimensions, *more, **options):
        asked, attention = (*more, *options.values()), self.attention.self
        part = _part_of_layer(self, attention, hidden_states, input_dimensions, *asked)
        if part is None:
            return super().forward(hidden_states, input_dimensions, *more, **options)
        (x,) = self.attention(hidden_states, part)
        x = hidden_states + self.drop_path(self.layernorm_before(x))
        y = self.output(self.intermediate(x))
        return (x + self.drop_path(self.layernorm_after(y)),)


def _part_of_layer(
    layer: nn.Module, attention: nn.Module, x: Tensor, grid: tuple[int, int], *asked: object
) -> GridPartition | None:
    if asks_more(attention, *asked) or not _is_taken(attention, x):
        return None
    window, shift = (layer.window_size,) * 2, (layer.shift_size,) * 2
    if window != tuple(attention.reader.window(attention)):
        return None  # the layer's own code says what is wrong
    return _part_of(attention, x, grid, window, shift, True)


# --- MONAI: padded, then rolled; on a smaller grid the window is the grid ------------------------


class FusedMonaiBlock(Fused):
    """SwinTransformerBlock, and Video-Swin's."""

    def forward_part1(self, x: Tensor, mask_matrix: Tensor | None) -> Tensor:
        part = _part_of_block(self, x)
        if part is None:
            return super().forward_part1(x, mask_matrix)  # type: ignore[misc]  # as above
        return self.attn(self.norm1(x).flatten(1, -2), part).view(x.shape)


class FusedMonaiLayer(Fused):
    """BasicLayer, which makes a mask for its blocks; fused ones do not read it."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.movedim(1, -1)
        if any([_part_of_block(block, y) is None for block in self.blocks]):
            return super().forward(x)
        for block in self.blocks:
            y = block(y, None)
        if self.downsample is not None:
            y = self.downsample(y)
        return y.movedim(-1, 1)


def _part_of_block(block: nn.Module, x: Tensor) -> GridPartition | None:
    if not _is_taken(block.attn, x):
        return None
    grid = x.shape[1:-1]
    window, shift = window_and_shift(grid, block.window_size, block.shift_size)
    return _part_of(block.attn, x, grid, window, shift, True)


# --- torchvision: padded, then rolled -----------------------------------------------------------


class FusedTorchvisionAttention(Fused):
    """ShiftedWindowAttention, [B, H, W, C]; and that of volumes, [B, D, H, W, C]."""

    reader = Torchvision()

    def forward(self, x: Tensor) -> Tensor:
        part = None
        if may_take(self, x):
            grid = x.shape[1:-1]
            window, shift = window_and_shift(grid, self.window_size, self.shift_size)
            if len(window) == 2:  # is padded to it where it is larger than the grid
                window = self.window_size
            part = _part_of(self, x, grid, window, shift, True)
        if part is None:
            return super().forward(x)
        return attend_in(self, x.flatten(1, -2), part, part.pads).view(x.shape)


class FusedTorchvisionV2Attention(FusedTorchvisionAttention):
    reader = TorchvisionV2()


# --- MaxViT: windows that divide the grid, and grids of tokens that are apart --------------------


class FusedTimmMaxVitBlock(Fused):
    """timm's PartitionAttentionCl."""

    def _partition_attn(self, x: Tensor) -> Tensor:
        part = None
        if tuple(self.partition_size) == tuple(self.attn.rel_pos.window_size):
            part = _part_of_maxvit(self.attn, x, x.shape[1:3], self.partition_block)
        if part is None:
            return super()._partition_attn(x)  # type: ignore[misc]  # the other base has it
        return self.attn(x.flatten(1, 2), part).view(x.shape)


class FusedTorchvisionMaxVitLayer(Fused):
    """PartitionAttentionLayer, [B, C, H, W], with channels last in memory, as the next takes it."""

    def forward(self, x: Tensor) -> Tensor:
        part, around = None, self.attn_layer  # which a hook sees as one
        if len(around) == 3 and not has_hooks(around):
            in_windows = self.partition_type == "window"
            part = _part_of_maxvit(around[1], x, x.shape[2:], in_windows)
        if part is None or tuple(x.shape[2:]) != tuple(self.grid_size):
            return super().forward(x)
        norm, attention, dropout = around
        y = x.flatten(2).mT.contiguous()
        y = y + self.stochastic_dropout(dropout(attention(norm(y), part)))
        y = y + self.stochastic_dropout(self.mlp_layer(y))
        return y.mT.reshape(x.shape)


def _part_of_maxvit(
    attention: nn.Module, x: Tensor, grid: Sequence[int], in_windows: bool
) -> GridPartition | None:
    """Of windows, or of a grid: tokens that are H / M rows and W / M columns apart."""
    if not _is_taken(attention, x):
        return None
    (height, width), (high, wide) = grid, attention.reader.window(attention)
    if height % high or width % wide:
        return None  # the library's code says what is wrong
    axes, window = [height, width], [high, wide]
    if not in_windows:  # the same as windows, if both axes are cut in two
        axes, window = [high, height // high, wide, width // wide], [high, 1, wide, 1]
    part = grid_partition(axes, window, [0] * len(axes), (high, wide), x.device)
    return part if takes(attention, x, part) else None
