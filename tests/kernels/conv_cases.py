"""Problems of the convolution of visible tokens, and what they come to."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

import greenmim_kernels as gk
from greenmim_kernels.testing import assert_within_budget


@dataclasses.dataclass
class ConvInputs:
    """x, grad_out [B, N, C]; weight [C, 9] and bias [C] in at least fp32; neighbours [P, N, 9]."""

    x: Tensor
    grad_out: Tensor
    weight: Tensor
    bias: Tensor | None
    neighbours: Tensor

    def to(self, dtype: torch.dtype) -> ConvInputs:
        sums = torch.promote_types(dtype, torch.float32)
        return dataclasses.replace(
            self,
            x=self.x.to(dtype),
            grad_out=self.grad_out.to(dtype),
            weight=self.weight.to(sums),
            bias=None if self.bias is None else self.bias.to(sums),
        )


def visible_grids(
    grid: tuple[int, int], images: int, visible: float = 0.5, seed: int = 0
) -> np.ndarray:
    """Random masks, bool [images, H, W], of equally many visible tokens."""
    rng = np.random.default_rng(seed)
    cells = grid[0] * grid[1]
    grids = np.zeros((images, cells), dtype=bool)
    for row in grids:
        row[rng.permutation(cells)[: max(1, int(cells * visible))]] = True
    return grids.reshape(images, *grid)


def make_conv(
    channels: int,
    grid: tuple[int, int] = (9, 7),
    batch: int = 3,
    per_image: bool = False,
    dtype: torch.dtype = torch.float32,
    shuffled: bool = False,
    visible: float = 0.5,
    has_bias: bool = True,
    seed: int = 0,
    device: str = "cpu",
) -> ConvInputs:
    """Random values and a random mask; `shuffled` numbers the tokens in no order."""
    rng = np.random.default_rng(seed)
    neighbours = gk.grid_neighbours(visible_grids(grid, batch if per_image else 1, visible, seed))
    count = neighbours.shape[1]
    if shuffled:
        for row in neighbours:  # token t becomes number[t]
            number = torch.from_numpy(rng.permutation(count).astype(np.int32))
            renumbered = torch.where(row >= 0, number[row.clamp(min=0).long()], -1)
            row[number.long()] = renumbered
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = ConvInputs(
        draw(batch, count, channels), draw(batch, count, channels), draw(channels, 9),
        draw(channels) if has_bias else None, neighbours,
    ).to(dtype)  # fmt: skip
    values = {k: None if v is None else v.to(device) for k, v in vars(inputs).items()}
    return ConvInputs(**values)


def run_conv(inputs: ConvInputs) -> dict[str, Tensor]:
    """{"out", "grad_x", "grad_weight", "grad_bias"}, in the backend in force."""
    leaves = {"x": inputs.x, "weight": inputs.weight, "bias": inputs.bias}
    leaves = {k: v.detach().requires_grad_() for k, v in leaves.items() if v is not None}
    out = gk.sparse_depthwise_conv(
        leaves["x"], leaves["weight"], leaves.get("bias"), inputs.neighbours
    )
    grads = torch.autograd.grad(out, list(leaves.values()), inputs.grad_out)
    return {"out": out.detach(), **{f"grad_{k}": g for k, g in zip(leaves, grads, strict=True)}}


def conv_agrees(actual: dict[str, Tensor], inputs: ConvInputs) -> None:
    """Within the error budget, of the gradients that are there."""
    double = inputs.x.dtype == torch.float64
    with gk.use_backend("reference"):
        plain = run_conv(inputs.to(torch.float32) if double else inputs)
        exact = run_conv(inputs.to(torch.float64))
    assert_within_budget(actual, plain, {k: v for k, v in exact.items() if k in actual})
