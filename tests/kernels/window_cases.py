"""Windows of every kind: arguments of `partition_from_windows`, and what they mean densely."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

import greenmim_kernels as gk
from greenmim_kernels.testing import Inputs

HEADS = 2


@dataclasses.dataclass
class Windows:
    """A problem: arguments of partition_from_windows, and what attends to what, densely.

    index [P, W, n]; attends bool [W, n, n] before empty slots; rows int [W, n, n] of the table.
    """

    index: Tensor
    arguments: dict
    attends: Tensor
    rows: Tensor
    table_rows: int
    tokens: int
    pad: bool = False

    def partition(self, **changes) -> gk.GroupPartition:
        arguments = {"num_tokens": self.tokens, "pad": self.pad, **self.arguments, **changes}
        return gk.partition_from_windows(self.index, **arguments)


def linear_rows(coords: Tensor, window) -> Tensor:
    """int [W, n, axes] -> the table's row of each pair [W, n, n]."""
    offset = coords[:, :, None] - coords[:, None]
    rows = torch.zeros(offset.shape[:-1], dtype=torch.long)
    for axis, side in enumerate(window):
        rows = rows * (2 * side - 1) + (offset[..., axis] + side - 1)
    return rows


def similar_keys(window: int, group_size: int, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """Queries and keys near one direction, values far from zero: scores' gradients cancel."""
    torch.manual_seed(0)
    grid = torch.ones(window, window, dtype=torch.bool)
    part = gk.group_partition(grid, window, group_size=group_size)
    near = torch.nn.functional.normalize(torch.randn(32), dim=0)
    q, k = (
        torch.nn.functional.normalize(near + 0.3 * torch.randn(window**2, 32) / 32**0.5, dim=-1)
        for _ in range(2)
    )
    qkv = torch.cat([q, k, torch.randn(window**2, 32) + 3], -1)[None]
    table = torch.randn(part.table_rows, 1)
    grad_out = torch.randn(1, window**2, 32)
    return Inputs(qkv.to(device, dtype), table.to(device), grad_out.to(device, dtype),
                  part.to(device), 1)  # fmt: skip


def scale_error(grad_qkv: Tensor, inputs: Inputs, scale: float) -> float:
    """How far a scale's gradient, the sum of q and q's gradient over the scale, is off."""
    exact = inputs.to(torch.float64)
    qkv = exact.qkv.detach().requires_grad_()
    with gk.use_backend("reference"):
        out = gk.group_window_attention(qkv, exact.table, exact.part, 1, scale)
    (expected,) = torch.autograd.grad(out, qkv, exact.grad_out)
    found, right = ((exact.qkv * x.double())[..., :32].sum().item() for x in (grad_qkv, expected))
    return abs(found / right - 1)


@st.composite
def problems(draw) -> Windows:
    """Windows of every kind: empty slots, left-out tokens, labels, tables by place or by index."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    images, windows = draw(st.sampled_from([1, 1, 3])), draw(st.integers(1, 7))
    window = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    slots = math.prod(window)
    tokens = draw(st.integers(1, windows * slots + 5))
    pad = draw(st.booleans())
    index = np.full((images, windows * slots), -1)
    for row in index:
        count = rng.integers(1, min(tokens, windows * slots) + 1)
        row[rng.permutation(windows * slots)[:count]] = rng.permutation(tokens)[:count]
    index = torch.from_numpy(index).view(images, windows, slots)
    attends = torch.ones(windows, slots, slots, dtype=torch.bool)
    arguments: dict = {}
    kind = draw(st.sampled_from(["none", "segment", "mask"]))
    if kind != "none":
        labels = torch.from_numpy(rng.integers(-2, 2, (windows, slots)))
        attends = labels[:, :, None] == labels[:, None]
        arguments[kind] = labels if kind == "segment" else torch.where(attends, 0.0, -100.0)
    places = torch.from_numpy(np.stack(np.unravel_index(np.arange(slots), window), -1))
    places = places[None].expand(windows, -1, -1)
    bias = draw(st.sampled_from(["none", "default", "coords", "index", "dense"]))
    rows, table_rows = torch.zeros(windows, slots, slots, dtype=torch.long), 0
    if bias != "none":
        if bias == "coords":
            order = torch.from_numpy(np.stack([rng.permutation(slots) for _ in range(windows)]))
            places = places.gather(1, order[..., None].expand_as(places)) + 3
            arguments["coords"] = places
        rows, table_rows = linear_rows(places, window), math.prod(2 * m - 1 for m in window)
        if bias == "dense":
            rows = torch.arange(slots**2).view(1, slots, slots).expand(windows, -1, -1)
            table_rows = slots**2
        if bias in ("index", "dense"):
            arguments["bias_index"] = draw(st.sampled_from([rows, rows[0], rows[0].flatten()]))
        else:
            arguments["window_size"] = window
    return Windows(index, arguments, attends, rows, table_rows, tokens, pad)


def swin(grid=(13, 9), window=(4, 4), shift=(1, 2), pad=True) -> Windows:
    """Swin on a grid that its window does not divide, cut as timm and torchvision do."""
    size = [-(-side // m) * m for side, m in zip(grid, window, strict=True)]
    index = torch.full(size, -1)
    index[: grid[0], : grid[1]] = torch.arange(math.prod(grid)).view(grid)

    def cut(x):
        rows, columns = (side // m for side, m in zip(size, window, strict=True))
        x = x.view(rows, window[0], columns, window[1]).transpose(1, 2)
        return x.reshape(rows * columns, -1)

    regions = torch.zeros(size, dtype=torch.long)
    ends = [((0, s - m), (s - m, s - t), (s - t, s))
            for s, m, t in zip(size, window, shift, strict=True)]  # fmt: skip
    for number, ((a, b), (c, d)) in enumerate(itertools.product(*ends)):
        regions[a:b, c:d] = number
    labels = cut(regions)
    index = cut(index.roll([-s for s in shift], (0, 1)))
    attends = labels[:, :, None] == labels[:, None]
    places = torch.stack(
        torch.meshgrid(*(torch.arange(m) for m in window), indexing="ij"), -1
    ).view(1, -1, 2)
    rows = linear_rows(places.expand(len(index), -1, -1), window)
    arguments = {"window_size": window, "mask": torch.where(attends, 0.0, -100.0)}
    table_rows = math.prod(2 * m - 1 for m in window)
    return Windows(index[None], arguments, attends, rows, table_rows, math.prod(grid), pad)


def volume(grid=(4, 7, 10), window=(4, 7, 7), **arguments) -> Windows:
    """Windows of a grid of any number of axes, which pad it."""
    counts = [-(-side // m) for side, m in zip(grid, window, strict=True)]
    index = torch.full([n * m for n, m in zip(counts, window, strict=True)], -1)
    index[tuple(slice(side) for side in grid)] = torch.arange(math.prod(grid)).view(grid)
    cells = index.view([x for pair in zip(counts, window, strict=True) for x in pair])
    axes = [*range(0, 2 * len(grid), 2), *range(1, 2 * len(grid), 2)]
    index = cells.permute(axes).reshape(math.prod(counts), -1)
    places = torch.from_numpy(np.stack(np.unravel_index(np.arange(index.shape[1]), window), -1))
    rows = linear_rows(places[None], window).expand(len(index), -1, -1)
    attends = torch.ones_like(rows, dtype=torch.bool)
    table_rows = math.prod(2 * m - 1 for m in window)
    return Windows(index[None], {"window_size": window, **arguments}, attends, rows, table_rows,
                   math.prod(grid), pad=True)  # fmt: skip


def window_inputs(
    problem: Windows, dtype: torch.dtype, head_dim: int, batch: int | None = None, seed: int = 0
) -> Inputs:
    """Random inputs of a problem, that the dtype holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    batch, channels = batch or len(problem.index), HEADS * head_dim

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Inputs(
        qkv=draw(batch, problem.tokens, 3 * channels),
        table=draw(problem.table_rows, HEADS) if problem.table_rows else None,
        grad_out=draw(batch, problem.tokens, channels),
        part=problem.partition(),
        num_heads=HEADS,
        pad_value=draw(3 * channels) if problem.pad else None,
    ).to(dtype)
