"""A step like SimMIM's on a fused Swin of timm: mask tokens in hidden places, all computed.

    python -m examples.simmim_step

After SimMIM (Xie et al., CVPR 2022): the encoder sees every place, a linear layer tells the pixels
of the hidden ones. It computes four times what GreenMIM does, on the same kernels.
"""

import timm
import torch
from torch import Tensor, nn

from greenmim_kernels.integrations import fuse_window_attention

from .waves import train, waves

IMAGE, UNIT, PATCH, WIDTH = 64, 8, 4, 32  # a unit is what is hidden together, 2 x 2 patches
UNITS = IMAGE // UNIT


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = timm.models.swin_transformer.SwinTransformer(
            img_size=IMAGE, patch_size=PATCH, in_chans=1, num_classes=0, embed_dim=WIDTH,
            depths=(2, 2), num_heads=(2, 4), window_size=4, drop_path_rate=0.0,
        )  # fmt: skip
        print(fuse_window_attention(self.encoder))
        self.mask_token = nn.Parameter(torch.zeros(WIDTH))
        self.head = nn.Linear(2 * WIDTH, UNIT**2)

    def forward(self, images: Tensor, hidden: Tensor) -> Tensor:
        """images [B, 1, H, W], hidden bool [B, units, units] -> the loss."""
        of_patches = hidden.repeat_interleave(UNIT // PATCH, 1).repeat_interleave(UNIT // PATCH, 2)
        x = self.encoder.patch_embed(images)  # [B, H, W, C]
        x = torch.where(of_patches[..., None], self.mask_token, x)
        x = self.head(self.encoder.layers(x))  # [B, units, units, pixels]
        target = images.view(-1, UNITS, UNIT, UNITS, UNIT).transpose(2, 3).flatten(3)
        return ((x - target) ** 2).mean(-1)[hidden].mean()


def main(steps: int = 150) -> list[float]:
    torch.manual_seed(0)
    model = Masked()

    def loss_of() -> Tensor:
        whole = waves((UNITS, UNITS), UNIT, 16).view(-1, UNITS, UNITS, UNIT, UNIT)
        images = whole.transpose(2, 3).reshape(-1, 1, IMAGE, IMAGE)
        return model(images, torch.rand(16, UNITS, UNITS) < 0.6)

    return train(model, loss_of, steps)


if __name__ == "__main__":
    main()
