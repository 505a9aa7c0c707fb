"""What a step needs to know about its masks, worked out on the CPU ahead of the step.

The shapes of a plan depend on the configuration and the number of visible units alone, never on
which units are visible: a step given its plan does not wait for the host, and compiles once. A plan
is one piece of memory, so that it reaches a device, or the fixed inputs of a CUDA graph, in one
copy.

Inside the encoder visible tokens are ordered by unit, units row-major. Within a unit the four
children of each token of the next stage are adjacent, in Swin's order (0,0), (1,0), (0,1), (1,1).
Patch merging is then a change of shape that moves nothing. At stage 4, where a token is a unit,
that order is row-major.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from greenmim_kernels import (
    GroupPartition,
    grid_neighbours,
    group_partition,
    partition_capacity,
)

from .config import UNIT_PIXELS, ModelConfig, check_image_size

_ALIGNMENT = 64  # bytes; kernels read 16 at a time
_CHILDREN = ((0, 0), (1, 0), (0, 1), (1, 1))


@dataclasses.dataclass(frozen=True)
class Region:
    """Where a tensor lies in a plan's memory; `start` and `end` are in bytes."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape) * self.dtype.itemsize

    def of(self, memory: Tensor) -> Tensor:
        """The tensor, a view."""
        return memory[self.start : self.end].view(self.dtype).view(self.shape)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each tensor of a :class:`Plan` lies, under the same names.

    Tensors of the partitions are regions; patch_grid is (height, width) of the images in patches.
    """

    visible: Region
    unit_index: Region
    hidden_index: Region
    patch_index: Region
    partitions: tuple[tuple[GroupPartition, GroupPartition], ...]
    neighbours: tuple[Region, ...]
    patch_grid: tuple[int, int]

    def regions(self) -> tuple[Region, ...]:
        """Every region, in a fixed order; equal for plans of equal shapes."""
        parts = [part for pair in self.partitions for part in pair]
        inner: Iterator[Any] = (region for part in parts for region in part.tensors)
        own = self.visible, self.unit_index, self.hidden_index, self.patch_index
        return *own, *inner, *self.neighbours


class Plan:
    """The visible tokens of a batch at every stage. P = 1 (one mask for the batch) or B.

    Args:
        memory: uint8 [bytes], which all tensors are views of.
        layout: where each tensor lies in it.

    Attributes:
        visible: bool [P, L], True = visible.
        unit_index: int64 [P, n_vis], the visible units in row-major order.
        hidden_index: int64 [P, L - n_vis], the hidden units in row-major order.
        patch_index: int64 [P, N1], the visible patches in the flattened patch grid, in the order of
            the encoder.
        partitions: per stage, that of its even blocks and that of its odd (shifted) blocks; the
            same object twice where nothing is shifted. Tokens are numbered in the encoder's order.
        neighbours: per stage, int32 [P, N, 9], the neighbours of each visible token in the
            encoder's order (see `grid_neighbours`); () for an encoder that needs none.
    """

    def __init__(self, memory: Tensor, layout: Layout) -> None:
        self.memory, self.layout = memory, layout
        self.visible = layout.visible.of(memory)
        self.unit_index = layout.unit_index.of(memory)
        self.hidden_index = layout.hidden_index.of(memory)
        self.patch_index = layout.patch_index.of(memory)
        self.partitions = _map_partitions(layout.partitions, lambda region: region.of(memory))
        self.neighbours = tuple(region.of(memory) for region in layout.neighbours)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Plan:
        """The same plan on a device."""
        return Plan(self.memory.to(device, non_blocking=non_blocking), self.layout)

    def pin_memory(self) -> Plan:
        """The same plan in pinned memory, from where it can be copied asynchronously."""
        return Plan(self.memory.pin_memory(), self.layout)

    def __reduce__(self):
        # Loader processes send one tensor, not one for each view.
        return Plan, (self.memory, self.layout)


def _map_partitions(partitions, change):
    """Pairs of partitions with each of their tensors (or regions) changed."""
    pairs = []
    for even, odd in partitions:
        first = even.map(change)
        pairs.append((first, first if odd is even else odd.map(change)))
    return tuple(pairs)


def _packed(
    tensors: dict[str, Tensor], partitions, neighbours: list[Tensor], patch_grid: tuple[int, int]
) -> Plan:
    """A plan that holds these values in one piece of memory."""
    sources: list[tuple[Region, Tensor]] = []

    def reserve(tensor: Tensor) -> Region:
        end = sources[-1][0].end if sources else 0
        start = math.ceil(end / _ALIGNMENT) * _ALIGNMENT
        sources.append((Region(start, tensor.dtype, tuple(tensor.shape)), tensor))
        return sources[-1][0]

    regions = {name: reserve(tensor) for name, tensor in tensors.items()}
    layout = Layout(
        **regions,
        partitions=_map_partitions(partitions, reserve),
        neighbours=tuple(map(reserve, neighbours)),
        patch_grid=patch_grid,
    )
    memory = torch.zeros(sources[-1][0].end, dtype=torch.uint8)
    content = memory.numpy()  # NumPy copies small arrays faster than PyTorch
    for target, tensor in sources:
        values = np.ascontiguousarray(tensor.numpy()).reshape(-1)
        content[target.start : target.end] = values.view(np.uint8)
    return Plan(memory, layout)


class Planner:
    """Makes plans for a model; small and picklable, for data loader workers.

    Args:
        config: the model's configuration.
        image_size: pixels of the images to plan for; None for the model's own.

    Attributes:
        unit_grid: (height, width) of the images in units.
        stages: (token grid, window, shift of odd blocks) per stage, each (height, width) in tokens.
        has_neighbours: whether plans list the neighbours of each visible token.

    Raises:
        ValueError: `image_size` is not made of multiples of 32.
    """

    def __init__(self, config: ModelConfig, image_size: int | Sequence[int] | None = None) -> None:
        sides = check_image_size(config.image_size if image_size is None else image_size)
        self.unit_grid = (sides[0] // UNIT_PIXELS, sides[1] // UNIT_PIXELS)
        self.stages = config.stage_windows(sides)
        self.has_neighbours = config.traits.has_neighbours

    def __call__(self, visible: np.ndarray | Tensor) -> Plan:
        """Plan a step.

        Args:
            visible: bool unit grid, row-major: [L] for the whole batch or [B, L], one per image.

        Raises:
            ValueError: wrong shape or dtype, no visible unit, or counts that differ between images.
        """
        units = self._check(visible)
        blocks = units.reshape(-1, *self.unit_grid)
        partitions, neighbours = [], []
        for grid, window, shift in self.stages:
            scale = grid[0] // self.unit_grid[0]
            tokens = blocks.repeat(scale, 1).repeat(scale, 2)  # [P, H, W]
            # numbers[:, r] is the encoder's number of the r-th token in row-major order. The last
            # column, -1, is what the index -1 of padding finds.
            numbers = np.full((len(units), tokens[0].sum() + 1), -1, dtype=np.int32)
            numbers[:, :-1] = self.positions(units, scale).argsort(1)
            even = self._partition(tokens, window, (0, 0), numbers)
            odd = self._partition(tokens, window, shift, numbers) if any(shift) else even
            partitions.append((even, odd))
            if self.has_neighbours:
                neighbours.append(torch.from_numpy(_renumbered(grid_neighbours(tokens), numbers)))
        arrays = {
            "visible": units,
            "unit_index": _indices(units),
            "hidden_index": _indices(~units),
            "patch_index": self.positions(units, self.stages[0][0][0] // self.unit_grid[0]),
        }
        tensors = {name: torch.from_numpy(values) for name, values in arrays.items()}
        return _packed(tensors, partitions, neighbours, self.stages[0][0])

    def positions(self, units: np.ndarray, scale: int) -> np.ndarray:
        """Places of a stage's tokens in its flattened grid, in the order of the encoder.

        Args:
            units: bool [P, L], visible units, equally many in each row.
            scale: tokens along a side of a unit, a power of two.

        Returns:
            int64 [P, N].
        """
        row, column = _order_in_unit(scale)
        width = self.unit_grid[1]
        unit_row, unit_column = np.divmod(_indices(units)[..., None], width)  # [P, n_vis, 1]
        number = (unit_row * scale + row) * (width * scale) + unit_column * scale + column
        return number.reshape(len(units), -1)

    def _check(self, visible: np.ndarray | Tensor) -> np.ndarray:
        """The mask as bool [P, L], copied."""
        if isinstance(visible, Tensor):
            visible = visible.cpu().numpy()
        visible = np.asarray(visible)
        if visible.dtype != np.bool_:
            raise ValueError(f"visible must be bool (True = visible), got {visible.dtype}")
        height, width = self.unit_grid
        if visible.ndim not in (1, 2) or visible.shape[-1] != height * width or visible.size == 0:
            raise ValueError(
                f"visible must be [{height * width}] or [batch, {height * width}] for"
                f" {height} x {width} units, got shape {list(visible.shape)}"
            )
        counts = np.atleast_2d(visible).sum(1)
        if counts.min() == 0:
            raise ValueError("visible keeps no unit; at least one must be visible (True)")
        if counts.min() != counts.max():
            raise ValueError(
                f"image {counts.argmin()} has {counts.min()} visible units and image"
                f" {counts.argmax()} {counts.max()}; give every image of a batch the same number"
            )
        return np.array(visible, ndmin=2)

    @staticmethod
    def _partition(
        tokens: np.ndarray, window: tuple[int, int], shift: tuple[int, int], numbers: np.ndarray
    ) -> GroupPartition:
        """The partition of a grid, renumbered: its r-th token, row-major, is numbers[:, r]."""
        capacity = partition_capacity(tokens.shape[1:], window, shift, numbers.shape[1] - 1)
        # A grid for the whole batch has no batch axis in the partition's contract.
        part = group_partition(
            tokens[0] if len(tokens) == 1 else tokens, window, shift, capacity=capacity
        )
        rows = np.arange(len(numbers))[:, None, None]
        index = numbers[rows, part.token_index.numpy()]
        return dataclasses.replace(part, token_index=torch.from_numpy(index))


def check_images(images: Tensor, size: tuple[int, ...]) -> None:
    """Raises ValueError unless images are floating point [B, 3, H, W] with (H, W) = `size`."""
    if images.ndim != 4 or images.shape[1] != 3 or tuple(images.shape[2:]) != size:
        raise ValueError(
            f"images must be [B, 3, {size[0]}, {size[1]}] for this model,"
            f" got shape {list(images.shape)}"
            if len(size) == 2
            else f"images must be [B, 3, H, W], got shape {list(images.shape)}"
        )
    if not images.dtype.is_floating_point:
        raise ValueError(f"images must be floating point, got {images.dtype}")


def checked_plan(plan: Plan, planner: Planner, images: Tensor) -> Plan:
    """The plan on the device of the images.

    Raises:
        ValueError: it was made for another model, or for another number of images.
    """
    grid, expected = plan.layout.patch_grid, planner.stages[0][0]
    if grid != expected:
        raise ValueError(
            f"the plan is for {grid[0]} x {grid[1]} patches and this model has {expected[0]} x"
            f" {expected[1]}; make it with this model's plan()"
        )
    if (len(plan.neighbours) > 0) != planner.has_neighbours:
        raise ValueError("the plan is for another encoder; make it with this model's plan()")
    # A bias table tells by its rows; Twins has none, and would attend in the wrong windows.
    windows = [even.window_size for even, _ in plan.partitions]
    own_windows = [window for _, window, _ in planner.stages]
    if windows != own_windows:
        raise ValueError(
            f"the plan is for windows of {windows} tokens and this model has {own_windows}; make it"
            " with this model's plan()"
        )
    if len(plan.visible) not in (1, len(images)):
        raise ValueError(
            f"the masks are for {len(plan.visible)} images and the batch has {len(images)};"
            " give one mask for the batch or one per image"
        )
    if plan.memory.device == images.device:
        return plan
    return plan.to(images.device, non_blocking=True)


def _indices(units: np.ndarray) -> np.ndarray:
    """bool [P, L] with as many True in each row -> int64 [P, count], where they are."""
    return units.nonzero()[1].reshape(len(units), -1)


def _renumbered(neighbours: Tensor, numbers: np.ndarray) -> np.ndarray:
    """Neighbours [P, N, 9] in row-major order, renumbered to the encoder's order by `numbers`."""
    images = np.arange(len(numbers))[:, None]
    renumbered = np.empty(neighbours.shape, dtype=np.int32)
    renumbered[images, numbers[:, :-1]] = numbers[images[..., None], neighbours.numpy()]
    return renumbered


@functools.cache
def _order_in_unit(scale: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) in a unit of scale x scale tokens, the children of a token together."""
    row = column = np.zeros(1, dtype=np.int64)
    while scale > 1:
        rows, columns = np.transpose(_CHILDREN)
        row = (2 * row[:, None] + rows).reshape(-1)
        column = (2 * column[:, None] + columns).reshape(-1)
        scale //= 2
    return row, column
