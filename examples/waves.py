"""What the small examples learn from, and the loop that all of them have."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def waves(grid: tuple[int, ...], patch: int, count: int) -> Tensor:
    """Patches of waves of any direction, [count, tokens, pixels], on a grid of any axes."""
    x = 2 * math.pi * torch.rand(count, *[1] * len(grid))
    for axis, side in enumerate(grid):
        along = [1] * axis + [-1] + [1] * (len(grid) - axis - 1)
        frequency = 0.3 * (torch.rand(count, *[1] * len(grid)) - 0.5)
        x = x + frequency * torch.arange(side * patch).view(along)
    x = x.sin().view(count, *[size for side in grid for size in (side, patch)])
    axes = range(1, 2 * len(grid), 2)
    x = x.permute(0, *axes, *[axis + 1 for axis in axes])
    return x.reshape(count, math.prod(grid), patch ** len(grid))


def train(model: torch.nn.Module, loss_of: Callable[[], Tensor], steps: int) -> list[float]:
    """The loss of every step."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses
