"""The dense step that GreenMIM is compared with: SimMIM on timm's Swin or SwinV2.

Xie et al., SimMIM, CVPR 2022 (arXiv 2111.09886): all tokens go through the encoder, those of hidden
units as a learnt mask token; one linear layer predicts the pixels; L1 loss on hidden ones. Frozen.
"""

from __future__ import annotations

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn
from torch.nn import functional as F

from greenmim import ModelConfig
from greenmim.config import PATCH_PIXELS, UNIT_PIXELS


class SimMIM(nn.Module):
    """A Swin, or SwinV2, of a GreenMIM's sizes that sees every token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        network = {"swin": SwinTransformer, "swinv2": SwinTransformerV2}[config.encoder]
        self.encoder = network(
            img_size=config.image_hw,
            patch_size=PATCH_PIXELS,
            window_size=config.window_size,
            embed_dim=config.embed_dim,
            depths=config.depths,
            num_heads=config.num_heads,
            drop_path_rate=0.0,  # as SimMIM pre-trains; timm's default is another
            num_classes=0,
            global_pool="",
        )
        self.mask_token = nn.Parameter(torch.zeros(config.embed_dim))
        self.head = nn.Linear(config.stage_dims[-1], UNIT_PIXELS * UNIT_PIXELS * 3)
        self.unit_grid = config.unit_grid
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor, visible: Tensor) -> Tensor:
        """images [B, 3, H, W], visible bool [L] -> the loss, a scalar."""
        hidden = ~visible.view(self.unit_grid)
        scale = UNIT_PIXELS // PATCH_PIXELS
        tokens = hidden.repeat_interleave(scale, 0).repeat_interleave(scale, 1)[..., None]
        encoder = self.encoder
        x = encoder.patch_embed(images)  # [B, H / 4, W / 4, C]
        x = torch.where(tokens, self.mask_token.to(x.dtype), x)
        x = self.head(encoder.norm(encoder.layers(x)))  # [B, h, w, 3072]
        x = F.pixel_shuffle(x.permute(0, 3, 1, 2), UNIT_PIXELS)
        pixels = hidden.repeat_interleave(UNIT_PIXELS, 0).repeat_interleave(UNIT_PIXELS, 1)
        error = (x - images).abs() * pixels
        return error.sum() / (pixels.sum() * len(images) * 3)
