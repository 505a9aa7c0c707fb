"""The decoder's position embedding and blocks (He et al., CVPR 2022, as GreenMIM uses them)."""

from __future__ import annotations

import functools

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .config import ModelConfig


def sincos_position_embedding(dim: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sine-cosine embedding, float32 [1, H * W, dim], tokens row-major.

    The first half of the channels encodes the column and the second half the row, each as sines
    then cosines at frequencies 10000 ** (-4 k / dim), k = 0 .. dim / 4 - 1 (MAE's order).
    """
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) * 4 / dim)
    row, column = torch.meshgrid(
        *(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij"
    )
    halves = []
    for place in (column, row):
        angle = place.flatten()[:, None] * frequency
        halves += [angle.sin(), angle.cos()]
    return torch.cat(halves, 1).float()[None]


def decoder_blocks(config: ModelConfig) -> nn.ModuleList:
    """Plain ViT blocks of the decoder's width."""
    return nn.ModuleList(
        Block(
            config.decoder_dim,
            config.decoder_heads,
            qkv_bias=True,
            norm_layer=functools.partial(nn.LayerNorm, eps=config.norm_eps),
        )
        for _ in range(config.decoder_depth)
    )
