"""Swin on visible tokens only, with timm's parameters.

Source of the method: Huang et al., NeurIPS 2022 (arXiv 2205.13515), section 3; of the network: Liu
et al., ICCV 2021. With everything visible, on grids that are multiples of the window, it equals
timm's dense Swin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F

from greenmim_kernels import GroupPartition, group_window_attention

from ..config import UNIT_PIXELS, ModelConfig
from .shifted_windows import ShiftedWindowEncoder
from .visible import VisibleBlock

_TABLE = "attn.relative_position_bias_table"


class SwinBlock(VisibleBlock, SwinTransformerBlock):  # type: ignore[misc]  # its own `forward`
    """timm's Swin block on visible tokens."""

    def _attend(self, x: Tensor, part: GroupPartition) -> Tensor:
        attention = self.attn
        table = attention.relative_position_bias_table
        x = group_window_attention(attention.qkv(x), table, part, attention.num_heads)
        return attention.proj(x)


class SwinEncoder(ShiftedWindowEncoder, SwinTransformer):  # type: ignore[misc]  # its own `forward`
    """timm's Swin, but visible tokens in and out."""

    block = one_node_block = SwinBlock
    timm_default, sign = "swin_base_patch4_window7_224", _TABLE

    @staticmethod
    def merge(merging: nn.Module, x: Tensor) -> Tensor:
        return merging.reduction(merging.norm(x.unflatten(1, (-1, 4)).flatten(2)))

    @classmethod
    def to_official(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        official = {}
        for name, tensor in super().to_official(tensors).items():
            official[name] = tensor
            if name.endswith(_TABLE):
                official[name.replace("bias_table", "index")] = _position_index(name, tensor)
        return official

    @classmethod
    def to_swin_order(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: _middle_swapped(tensor) if ".downsample." in name else tensor
            for name, tensor in tensors.items()
        }

    @classmethod
    def sizes(cls, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Images are as large as the last stage's window: a table knows no more."""
        found = super().sizes(tensors)
        sides = {}
        for name, table in tensors.items():
            if name.endswith(_TABLE):
                sides[name[: len("layers.0")]] = side = (math.isqrt(len(table)) + 1) // 2
                if (2 * side - 1) ** 2 != len(table):
                    raise ValueError("its windows are not square; give the checkpoint of a run")
        pixels = UNIT_PIXELS * sides["layers.3"]
        return found | {"image_size": (pixels, pixels), "window_size": max(sides.values())}

    @staticmethod
    def heads_of(name: str, tensor: Tensor) -> int:
        if tensor.ndim != 2:
            raise ValueError(f"its {name} has {tensor.ndim} axes, not 2")
        return tensor.shape[1]

    @classmethod
    def fitted(
        cls, tensors: Mapping[str, Tensor], config: ModelConfig, own: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Tables of other windows are interpolated."""
        windows = [window for _, window, _ in config.stage_windows()]
        found = dict(tensors)
        resized: dict[int, int] = {}  # tables by their rows before
        for name, tensor in tensors.items():
            shape = own[name].shape if name in own else tensor.shape
            if name.endswith(_TABLE) and tensor.ndim == 2 and tensor.shape[1:] == shape[1:]:
                if len(tensor) != shape[0]:
                    found[name] = _resized(tensor, windows[int(name.split(".")[1])])
                    resized[len(tensor)] = resized.get(len(tensor), 0) + 1
        return found, [
            f"{count} position tables of windows of {(math.isqrt(rows) + 1) // 2} were interpolated"
            for rows, count in resized.items()
        ]


def _middle_swapped(tensor: Tensor) -> Tensor:
    """The middle two of the four channel blocks of a patch merging change places."""
    # norm.weight and norm.bias [4C], reduction.weight [2C, 4C]: always the last axis.
    first, second, third, fourth = tensor.chunk(4, -1)
    return torch.cat([first, third, second, fourth], -1)


def _position_index(name: str, table: Tensor) -> Tensor:
    """Rows of the table for all pairs of a square window, int64 [M * M, M * M]."""
    side = (round(table.shape[0] ** 0.5) + 1) // 2
    if (2 * side - 1) ** 2 != table.shape[0]:
        raise ValueError(f"{name} is of a window that is not square; official models have none")
    coords = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    offset = coords[:, None] - coords[None] + side - 1
    return offset[..., 0] * (2 * side - 1) + offset[..., 1]


def _resized(table: Tensor, window: tuple[int, int]) -> Tensor:
    """A table [(2 M - 1)^2, heads] for another window, as Swin's own code does it."""
    side = math.isqrt(len(table))
    if side**2 != len(table) or side % 2 == 0:
        raise ValueError("its windows are not square, and tables of those are not interpolated")
    size = tuple(2 * length - 1 for length in window)
    grid = table.float().T.unflatten(1, (side, side))[None]
    return F.interpolate(grid, size, mode="bicubic")[0].flatten(1).T.to(table.dtype)
