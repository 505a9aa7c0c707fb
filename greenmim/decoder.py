"""The decoder's position embedding and blocks (He et al., CVPR 2022, as GreenMIM uses them)."""

from __future__ import annotations

import functools

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

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


class DecoderBlock(Block):
    """timm's ViT block, able to give only some of its tokens."""

    def forward(self, x: Tensor, last: int | None = None) -> Tensor:
        """x [B, L, C] -> [B, L, C], or [B, last, C]: the last tokens, which attend to all."""
        if last is None or last == x.shape[1]:
            return super().forward(x)
        normed = self.norm1(x)
        x = x[:, x.shape[1] - last :]
        x = x + self.drop_path1(self.ls1(self._attend(normed, last)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def _attend(self, x: Tensor, last: int) -> Tensor:
        attention = self.attn
        width, heads = x.shape[2], attention.num_heads
        weights = attention.qkv.weight.split((width, 2 * width))
        biases = attention.qkv.bias.split((width, 2 * width))
        query = F.linear(x[:, x.shape[1] - last :].contiguous(), weights[0], biases[0])
        key_value = F.linear(x, weights[1], biases[1])
        query = query.unflatten(2, (heads, -1)).transpose(1, 2)  # [B, heads, last, D]
        key, value = key_value.unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value)
        return attention.proj(out.transpose(1, 2).flatten(2))


def decoder_blocks(config: ModelConfig) -> nn.ModuleList:
    """Plain ViT blocks of the decoder's width."""
    return nn.ModuleList(
        DecoderBlock(
            config.decoder_dim,
            config.decoder_heads,
            qkv_bias=True,
            norm_layer=functools.partial(nn.LayerNorm, eps=config.norm_eps),
        )
        for _ in range(config.decoder_depth)
    )
