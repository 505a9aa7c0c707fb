"""Blocks and layers of other libraries, without their rolling, padding and cutting into windows.

Their attention gets the tokens in the order of the grid, and a partition.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .attention import Fused, attend_in, can_run, has_room, wants_maps, wants_more
from .grids import GridPartition, grid_partition
from .readers import TorchvisionReader, TorchvisionV2Reader, has_hooks


def _grid_partition(
    attention: nn.Module,
    x: Tensor,
    grid: Sequence[int],
    window: Sequence[int],
    shift: Sequence[int],
    pads_first: bool,
) -> GridPartition | None:
    """The partition of a grid; None, after a warning, if the kernels have no room for it."""
    table_window = attention.reader.window_size(attention)
    part = grid_partition(grid, window, shift, table_window, x.device, pads_first=pads_first)
    return part if has_room(attention, x, part) else None


def _runs(attention: nn.Module, x: Tensor) -> bool:
    """Whether the attention runs on the kernels, with Swin's index.

    It may have been unfused since its block was fused, by loading another index.
    """
    has_swin_index = isinstance(attention, Fused) and attention.fused_from.has_swin_index
    return has_swin_index and can_run(attention, x)


def window_and_shift(
    grid: Sequence[int], window: Sequence[int], shift: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Along an axis that the window covers, the window is the whole axis and is not shifted."""
    axes = list(zip(grid, window, shift, strict=True))
    return (
        tuple([min(size, side) for size, side, _ in axes]),
        tuple([0 if size <= side else moved for size, side, moved in axes]),
    )


class FusedTimmBlock(Fused):
    """timm's Swin and SwinV2: rolled, then padded; x [B, H, W, C]."""

    def _attn(self, x: Tensor) -> Tensor:
        part = None
        if _runs(self.attn, x):
            grid, window, shift = x.shape[1:3], self.window_size, self.shift_size
            part = _grid_partition(self.attn, x, grid, window, shift, pads_first=False)
        if part is None:
            return super()._attn(x)  # type: ignore[misc]  # the other base has it
        return self.attn(x.flatten(1, 2), part).view(x.shape)


# --- Microsoft's Swin and SwinV2, and copies of them: rolled; the window divides the grid ---------


class FusedSwinBlock(Fused):
    """SwinTransformerBlock: ``forward(x)``, or ``forward(x, x_size)`` as in SwinIR."""

    def forward(self, x: Tensor, *size, **options) -> Tensor:
        part = _partition_of_swin_block(self, x, *size, *options.values())
        if part is None:
            return super().forward(x, *size, **options)
        x = x + self.drop_path(self.attn(self.norm1(x), part))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class FusedSwinV2Block(Fused):
    """SwinV2's, which normalizes after attention and MLP."""

    def forward(self, x: Tensor, *size, **options) -> Tensor:
        part = _partition_of_swin_block(self, x, *size, *options.values())
        if part is None:
            return super().forward(x, *size, **options)
        x = x + self.drop_path(self.norm1(self.attn(x, part)))
        return x + self.drop_path(self.norm2(self.mlp(x)))


def _partition_of_swin_block(
    block: nn.Module, x: Tensor, grid: tuple[int, int] | None = None, *more: object
) -> GridPartition | None:
    if more or not _runs(block.attn, x):
        return None
    height, width = block.input_resolution if grid is None else grid
    window, shift = (block.window_size,) * 2, (block.shift_size,) * 2
    divides = height % window[0] == width % window[0] == 0 and height * width == x.shape[1]
    if not divides or window != tuple(block.attn.reader.window_size(block.attn)):
        return None
    return _grid_partition(block.attn, x, (height, width), window, shift, pads_first=False)


# --- transformers: padded, then rolled ----------------------------------------------------------


class FusedHuggingFaceSwinLayer(Fused):
    """SwinLayer of transformers 5 and newer; x [B, H * W, C]."""

    def forward(self, hidden_states, input_dimensions, always_partition=False, **options):
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        maps = wants_maps(self.attention, options)
        part = _partition_of_layer(self, self.attention, hidden_states, input_dimensions, maps)
        if part is None:
            return super().forward(hidden_states, input_dimensions, always_partition, **options)
        x, maps = self.attention(self.layernorm_before(hidden_states), part, **options)
        x = hidden_states + self.drop_path(self.dropout(x))
        return x + self.dropout(self.mlp(self.layernorm_after(x))), maps


class FusedHuggingFacePreNormLayer(Fused):
    """SwinLayer before transformers 5, DonutSwinLayer, MaskFormerSwinLayer, ClapAudioLayer."""

    def forward(self, hidden_states, input_dimensions, *more, **options):
        asked, attention = (*more, *options.values()), self.attention.self
        if hasattr(self, "set_shift_and_window_size") and not any(asked):
            self.set_shift_and_window_size(input_dimensions)
        part = _partition_of_layer(self, attention, hidden_states, input_dimensions, *asked)
        if part is None:
            return super().forward(hidden_states, input_dimensions, *more, **options)
        (x,) = self.attention(self.layernorm_before(hidden_states), part)
        x = hidden_states + self.drop_path(x)
        return (x + self.output(self.intermediate(self.layernorm_after(x))),)


class FusedHuggingFaceSwinV2Layer(Fused):
    """Swinv2Layer and Swin2SRLayer, which normalize after attention and MLP."""

    def forward(self, hidden_states, input_dimensions, *more, **options):
        asked, attention = (*more, *options.values()), self.attention.self
        part = _partition_of_layer(self, attention, hidden_states, input_dimensions, *asked)
        if part is None:
            return super().forward(hidden_states, input_dimensions, *more, **options)
        (x,) = self.attention(hidden_states, part)
        x = hidden_states + self.drop_path(self.layernorm_before(x))
        y = self.output(self.intermediate(x))
        return (x + self.drop_path(self.layernorm_after(y)),)


def _partition_of_layer(
    layer: nn.Module, attention: nn.Module, x: Tensor, grid: tuple[int, int], *asked: object
) -> GridPartition | None:
    if wants_more(attention, *asked) or not _runs(attention, x):
        return None
    window, shift = (layer.window_size,) * 2, (layer.shift_size,) * 2
    if window != tuple(attention.reader.window_size(attention)):
        return None  # the layer's own code raises
    return _grid_partition(attention, x, grid, window, shift, pads_first=True)


# --- MONAI and Video-Swin: padded, then rolled; on a smaller grid the window is the grid ---------


class FusedMonaiBlock(Fused):
    """SwinTransformerBlock, and Video-Swin's SwinTransformerBlock3D; x [B, (D,) H, W, C]."""

    def forward_part1(self, x: Tensor, mask_matrix: Tensor | None) -> Tensor:
        part = _partition_of_block(self, x)
        if part is None:
            return super().forward_part1(x, mask_matrix)  # type: ignore[misc]  # as above
        return self.attn(self.norm1(x).flatten(1, -2), part).view(x.shape)


class FusedMonaiLayer(Fused):
    """BasicLayer, without the mask that it makes for its blocks: fused blocks do not read it."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.movedim(1, -1)
        if any([_partition_of_block(block, y) is None for block in self.blocks]):
            return super().forward(x)
        for block in self.blocks:
            y = block(y, None)
        if self.downsample is not None:
            y = self.downsample(y)
        return y.movedim(-1, 1)


def _partition_of_block(block: nn.Module, x: Tensor) -> GridPartition | None:
    if not _runs(block.attn, x):
        return None
    grid = x.shape[1:-1]
    window, shift = window_and_shift(grid, block.window_size, block.shift_size)
    return _grid_partition(block.attn, x, grid, window, shift, pads_first=True)


# --- torchvision: padded, then rolled -----------------------------------------------------------


class FusedTorchvisionAttention(Fused):
    """ShiftedWindowAttention, x [B, H, W, C], and ShiftedWindowAttention3d, [B, D, H, W, C]."""

    reader = TorchvisionReader()

    def forward(self, x: Tensor) -> Tensor:
        part = None
        if can_run(self, x):
            grid = x.shape[1:-1]
            window, shift = window_and_shift(grid, self.window_size, self.shift_size)
            if len(window) == 2:  # torchvision pads a smaller image to a whole window
                window = self.window_size
            part = _grid_partition(self, x, grid, window, shift, pads_first=True)
        if part is None:
            return super().forward(x)
        return attend_in(self, x.flatten(1, -2), part, part.pads).view(x.shape)


class FusedTorchvisionV2Attention(FusedTorchvisionAttention):
    """ShiftedWindowAttentionV2."""

    reader = TorchvisionV2Reader()


# --- MaxViT: windows that divide the grid ("block"), or tokens at equal distances ("grid") --------


class FusedTimmMaxVitBlock(Fused):
    """timm's PartitionAttentionCl, x [B, H, W, C]."""

    def _partition_attn(self, x: Tensor) -> Tensor:
        part = None
        if tuple(self.partition_size) == tuple(self.attn.rel_pos.window_size):
            part = _partition_of_maxvit(self.attn, x, x.shape[1:3], self.partition_block)
        if part is None:
            return super()._partition_attn(x)  # type: ignore[misc]  # the other base has it
        return self.attn(x.flatten(1, 2), part).view(x.shape)


class FusedTorchvisionMaxVitLayer(Fused):
    """PartitionAttentionLayer, x [B, C, H, W]; it works on channels last, and returns it."""

    def forward(self, x: Tensor) -> Tensor:
        part, sequence = None, self.attn_layer
        # Its modules are called one by one here, which a hook on the sequence would miss.
        if len(sequence) == 3 and not has_hooks(sequence):
            in_windows = self.partition_type == "window"
            part = _partition_of_maxvit(sequence[1], x, x.shape[2:], in_windows)
        if part is None or tuple(x.shape[2:]) != tuple(self.grid_size):
            return super().forward(x)
        norm, attention, dropout = sequence
        y = x.flatten(2).mT.contiguous()
        y = y + self.stochastic_dropout(dropout(attention(norm(y), part)))
        y = y + self.stochastic_dropout(self.mlp_layer(y))
        return y.mT.reshape(x.shape)


def _partition_of_maxvit(
    attention: nn.Module, x: Tensor, grid: Sequence[int], in_windows: bool
) -> GridPartition | None:
    """Windows, or else grids: tokens H / Mh rows and W / Mw columns apart attend to each other.

    Source: Tu et al., ECCV 2022 (arXiv 2204.01697), section 3.2.
    """
    if not _runs(attention, x):
        return None
    (height, width), (rows, columns) = grid, attention.reader.window_size(attention)
    if height % rows or width % columns:
        return None  # the library's code raises
    axes, window = [height, width], [rows, columns]
    if not in_windows:  # those are windows too, of a grid whose axes are split in two
        axes, window = [rows, height // rows, columns, width // columns], [rows, 1, columns, 1]
    return _grid_partition(attention, x, axes, window, [0] * len(axes), pads_first=False)
