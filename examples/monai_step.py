"""Self-supervised steps of MONAI's SwinUNETR on fused kernels: cut boxes out of volumes, fill them.

    pip install monai einops
    python -m examples.monai_step

The inpainting task of Swin UNETR's pre-training (Tang et al., CVPR 2022), on volumes of waves.
"""

import torch
from monai.networks.nets import SwinUNETR
from torch import Tensor, nn

from greenmim_kernels.integrations import fuse_window_attention

from .waves import train, waves

SIDE = 32


class Inpainting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        swin = SwinUNETR(in_channels=1, out_channels=1, feature_size=12, depths=(2, 2, 1, 1))
        print(fuse_window_attention(swin))
        self.encoder = swin.swinViT
        # The third stage's features, of 8^3 voxels each, back to voxels.
        self.head = nn.ConvTranspose3d(48, 1, kernel_size=8, stride=8)

    def forward(self, volumes: Tensor, hidden: Tensor) -> Tensor:
        """volumes and hidden (bool) [B, 1, D, H, W] -> the loss in what was cut out."""
        features = self.encoder(volumes.masked_fill(hidden, 0))[2]
        return ((self.head(features) - volumes) ** 2)[hidden].mean()


def boxes(count: int) -> Tensor:
    """A random box of each volume, True inside."""
    hidden = torch.ones(count, 1, SIDE, SIDE, SIDE, dtype=torch.bool)
    for axis in (2, 3, 4):
        start = torch.randint(0, SIDE // 2, (count, 1, 1, 1, 1))
        place = torch.arange(SIDE).view([-1 if a == axis else 1 for a in range(5)])
        hidden &= (place >= start) & (place < start + SIDE // 2)
    return hidden


def main(steps: int = 100) -> list[float]:
    torch.manual_seed(0)
    model = Inpainting()

    def loss_of() -> Tensor:
        volumes = waves((1, 1, 1), SIDE, 2).view(2, 1, SIDE, SIDE, SIDE)
        return model(volumes, boxes(2))

    return train(model, loss_of, steps)


if __name__ == "__main__":
    main()
