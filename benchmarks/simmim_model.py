"""The dense step that GreenMIM is compared with: SimMIM on timm's Swin, SwinV2 or Twins-SVT.

Xie et al., SimMIM, CVPR 2022 (arXiv 2111.09886): all tokens go through the encoder, those of hidden
units as a learnt mask token; one linear layer predicts the pixels; L1 loss on hidden ones. Frozen.
"""

from __future__ import annotations

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.twins import Twins
from torch import Tensor, nn
from torch.nn import functional as F

from greenmim import ModelConfig
from greenmim.config import PATCH_PIXELS, UNIT_PIXELS


class SimMIM(nn.Module):
    """A Swin, or SwinV2, of a GreenMIM's sizes that sees every token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        swin = {"embed_dim": config.embed_dim, "window_size": config.window_size}
        twins = {"embed_dims": config.stage_dims, "sr_ratios": config.sr_ratios}
        twins["wss"] = (config.window_size,) * len(config.depths)
        network, sizes = {
            "swin": (SwinTransformer, swin),
            "swinv2": (SwinTransformerV2, swin),
            "twins_svt": (Twins, twins),
        }[config.encoder]
        self.encoder = network(
            img_size=config.image_hw,
            patch_size=PATCH_PIXELS,
            depths=config.depths,
            num_heads=config.num_heads,
            drop_path_rate=0.0,  # as SimMIM pre-trains; timm's default is another
            num_classes=0,
            global_pool="",
            **sizes,
        )
        self.mask_token = nn.Parameter(torch.zeros(config.stage_dims[0]))
        self.head = nn.Linear(config.stage_dims[-1], UNIT_PIXELS * UNIT_PIXELS * 3)
        self.unit_grid = config.unit_grid
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor, visible: Tensor) -> Tensor:
        """images [B, 3, H, W], visible bool [L] -> the loss, a scalar."""
        hidden = ~visible.view(self.unit_grid)
        scale = UNIT_PIXELS // PATCH_PIXELS
        tokens = hidden.repeat_interleave(scale, 0).repeat_interleave(scale, 1)[..., None]
        if isinstance(self.encoder, Twins):
            x = self._twins(images, tokens.flatten(0, 1)).permute(0, 2, 3, 1)
        else:
            x = self.encoder.patch_embed(images)  # [B, H / 4, W / 4, C]
            x = self.encoder.layers(torch.where(tokens, self.mask_token.to(x.dtype), x))
        x = self.head(self.encoder.norm(x))  # [B, h, w, 3072]
        x = F.pixel_shuffle(x.permute(0, 3, 1, 2), UNIT_PIXELS)
        pixels = hidden.repeat_interleave(UNIT_PIXELS, 0).repeat_interleave(UNIT_PIXELS, 1)
        error = (x - images).abs() * pixels
        return error.sum() / (pixels.sum() * len(images) * 3)

    def _twins(self, x: Tensor, hidden: Tensor) -> Tensor:
        """timm's forward pass, with hidden [H / 4 * W / 4, 1] tokens put in."""
        encoder = self.encoder
        for number, embed in enumerate(encoder.patch_embeds):
            x, size = embed(x)  # [B, N, C]
            if number == 0:
                x = torch.where(hidden, self.mask_token.to(x.dtype), x)
            for index, block in enumerate(encoder.blocks[number]):
                x = block(x, size)
                if index == 0:
                    x = encoder.pos_block[number](x, size)
            x = x.transpose(1, 2).unflatten(2, size)
        return x  # [B, C, h, w]
