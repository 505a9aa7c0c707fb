"""Two images in one grid: a token attends to those of its own image, within its window.

    python -m examples.mixed_images

The encoder sees a patch of one of two images at each position, so that none of its tokens is a mask
token; a decoder tells the hidden patches of either image (after MixMIM, Liu et al., CVPR 2023).
"""

import numpy as np
import torch
from torch import Tensor, nn

from greenmim_kernels import GroupWindowAttention, group_partition

from .waves import train, waves

GRID, PATCH, WINDOW, WIDTH, HEADS = (16, 16), 4, 8, 64, 2


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(PATCH**2, WIDTH), nn.Linear(WIDTH, PATCH**2)
        self.place = nn.Parameter(0.02 * torch.randn(GRID[0] * GRID[1], WIDTH))
        self.mask_token = nn.Parameter(torch.zeros(WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        layers = (GroupWindowAttention(WIDTH, WINDOW, HEADS) for _ in range(3))
        self.attentions = nn.ModuleList(layers)

    def forward(self, images: tuple[Tensor, Tensor], shown: np.ndarray) -> Tensor:
        """images [B, tokens, pixels] each, shown int [H, W]: which of them -> the loss."""
        whole = np.ones(GRID, bool)
        parts = [group_partition(whole, WINDOW, shift, segment=shown) for shift in (0, WINDOW // 2)]
        parts.append(group_partition(whole, WINDOW))  # of the decoder
        is_second = torch.from_numpy(shown == 1).view(1, -1, 1)
        x = self.embed(torch.where(is_second, images[1], images[0])) + self.place
        for i in (0, 1):
            x = x + self.attentions[i](self.norms[i](x), parts[i])
        loss = 0
        for image, hidden in ((images[0], is_second), (images[1], ~is_second)):
            y = torch.where(hidden, self.mask_token, x) + self.place
            y = self.head(y + self.attentions[2](self.norms[2](y), parts[2]))
            loss = loss + ((y - image) ** 2)[:, hidden.flatten()].mean() / 2
        return loss


def main(steps: int = 200) -> list[float]:
    torch.manual_seed(0)
    model, draw = Mixed(), np.random.default_rng(0)

    def loss_of() -> Tensor:
        images = waves(GRID, PATCH, 8), waves(GRID, PATCH, 8)
        return model(images, draw.integers(0, 2, GRID))

    return train(model, loss_of, steps)


if __name__ == "__main__":
    main()
