"""A masked encoder of volumes or videos: windows of three axes, a quarter of the tokens computed.

python -m examples.masked_volume
"""

import numpy as np
import torch
from torch import Tensor, nn

from greenmim_kernels import GroupWindowAttention, group_partition

from .waves import train, waves

GRID, PATCH, WINDOW, WIDTH, HEADS = (4, 8, 8), 4, (2, 4, 4), 64, 2
TOKENS = GRID[0] * GRID[1] * GRID[2]


class MaskedVolume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(PATCH**3, WIDTH), nn.Linear(WIDTH, PATCH**3)
        self.place = nn.Parameter(0.02 * torch.randn(TOKENS, WIDTH))
        self.mask_token = nn.Parameter(torch.zeros(WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.attentions = nn.ModuleList(
            GroupWindowAttention(WIDTH, WINDOW, HEADS) for _ in range(3)
        )

    def forward(self, x: Tensor, visible: np.ndarray) -> Tensor:
        """x [B, tokens, pixels], visible bool [D, H, W] -> the loss on what is hidden."""
        kept = torch.from_numpy(visible.flatten())
        y = self.embed(x[:, kept]) + self.place[kept]  # row-major, as the partition counts them
        for i, shift in enumerate(((0, 0, 0), (1, 2, 2))):
            part = group_partition(visible, WINDOW, shift)
            y = y + self.attentions[i](self.norms[i](y), part)
        # The decoder sees everything: each token at its place, mask tokens in the others.
        full = (self.mask_token + self.place).repeat(len(x), 1, 1)
        full = full.index_copy(1, kept.nonzero()[:, 0], y)
        part = group_partition(np.ones(GRID, bool), WINDOW, (1, 2, 2))
        full = full + self.attentions[2](self.norms[2](full), part)
        return ((self.head(full) - x) ** 2)[:, ~kept].mean()


def main(steps: int = 200) -> list[float]:
    torch.manual_seed(0)
    model, draw = MaskedVolume(), np.random.default_rng(0)

    def loss_of() -> Tensor:
        visible = (draw.permutation(TOKENS) < TOKENS // 4).reshape(GRID)
        return model(waves(GRID, PATCH, 8), visible)

    return train(model, loss_of, steps)


if __name__ == "__main__":
    main()
