"""What a step needs to know about its masks, worked out on the CPU ahead of the step.

The shapes of a plan depend on the configuration and the number of visible units alone, never on
which units are visible: a step given its plan does not wait for the host, and compiles once.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from greenmim_kernels import GroupPartition, group_partition, partition_capacity

from .config import UNIT_PIXELS, ModelConfig, check_image_size


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The visible tokens of a batch at every stage. P = 1 (one mask for the batch) or B.

    Attributes:
        visible: bool [P, L], True = visible.
        unit_index: int64 [P, n_vis], the visible units in row-major order.
        patch_index: int64 [P, N1], the visible patches in the flattened patch grid.
        partitions: for each stage, those of its even blocks and of its odd (shifted) blocks; one
            object twice where nothing is shifted.
        merges: for each step to the next stage, the 2 x 2 cells as groups (`merge_partition`).
    """

    visible: Tensor
    unit_index: Tensor
    patch_index: Tensor
    partitions: tuple[tuple[GroupPartition, GroupPartition], ...]
    merges: tuple[GroupPartition, ...]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Plan:
        """A copy of the plan on a device."""
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Plan:
        """A copy of the plan in pinned memory, from where it can be copied asynchronously."""
        return self._map(lambda part: part.pin_memory())

    def _map(self, move) -> Plan:
        partitions = []
        for even, odd in self.partitions:
            moved = move(even)
            partitions.append((moved, moved if odd is even else move(odd)))
        return Plan(
            visible=move(self.visible),
            unit_index=move(self.unit_index),
            patch_index=move(self.patch_index),
            partitions=tuple(partitions),
            merges=tuple(move(part) for part in self.merges),
        )


class Planner:
    """Makes plans for a model; small, picklable, without weights: made for data loader workers.

    Args:
        config: the model's configuration.
        image_size: pixels of the images to plan for; the model's own if None.

    Raises:
        ValueError: `image_size` is not made of multiples of 32.
    """

    def __init__(
        self, config: ModelConfig, image_size: int | tuple[int, int] | None = None
    ) -> None:
        sides = check_image_size(config.image_size if image_size is None else image_size)
        self.unit_grid = tuple(side // UNIT_PIXELS for side in sides)
        self.stages = config.stage_windows(sides)

    def __call__(self, visible: np.ndarray | Tensor) -> Plan:
        """Plan a step.

        Args:
            visible: bool unit grid, row-major: [L] for the whole batch or [B, L], one per image.

        Raises:
            ValueError: wrong shape or dtype, no visible unit, or counts that differ between images.
        """
        units = self._check(visible)
        blocks = units.reshape(-1, *self.unit_grid)
        scales = [grid[0] // self.unit_grid[0] for grid, _, _ in self.stages]
        grids = [blocks.repeat(scale, 1).repeat(scale, 2) for scale in scales]  # [P, H, W] each
        partitions = []
        for tokens, (_, window, shift) in zip(grids, self.stages, strict=True):
            count = int(tokens[0].sum())
            even = self._partition(tokens, window, (0, 0), count)
            odd = self._partition(tokens, window, shift, count) if any(shift) else even
            partitions.append((even, odd))
        return Plan(
            visible=torch.from_numpy(units),
            unit_index=_positions(units),
            patch_index=_positions(grids[0]),
            partitions=tuple(partitions),
            merges=tuple(merge_partition(fine, coarse) for fine, coarse in pairwise(grids)),
        )

    def _check(self, visible: np.ndarray | Tensor) -> np.ndarray:
        """bool [P, L], a copy of its own."""
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
                f" {counts.argmax()} {counts.max()}; all images of a batch need as many"
            )
        return np.array(visible, ndmin=2)

    @staticmethod
    def _partition(
        tokens: np.ndarray, window: tuple[int, int], shift: tuple[int, int], count: int
    ) -> GroupPartition:
        capacity = partition_capacity(tokens.shape[1:], window, shift, count)
        # A grid for the whole batch has no batch axis in the partition's contract.
        grid = tokens[0] if len(tokens) == 1 else tokens
        return group_partition(grid, window, shift, capacity=capacity)


def _positions(grid: np.ndarray) -> Tensor:
    """bool [P, ...] with equal counts -> int64 [P, count], positions in the flattened rest."""
    flat = grid.reshape(len(grid), -1)
    return torch.from_numpy(flat.nonzero()[1].reshape(len(grid), -1))


def merge_partition(fine: np.ndarray, coarse: np.ndarray) -> GroupPartition:
    """Patch merging as a gather: the four tokens of every visible 2 x 2 cell are a group.

    Args:
        fine: bool [P, 2H, 2W], visible tokens of a stage.
        coarse: bool [P, H, W], visible tokens of the next; a visible one has four visible children.

    Returns:
        A partition with a group for each visible token of `coarse`, in row-major order, and its
        children in Swin's order (0,0), (1,0), (0,1), (1,1) - not row-major, as windows are.
    """
    rank = fine.reshape(len(fine), -1).cumsum(1, dtype=np.int32).reshape(fine.shape) - 1
    places = ((0, 0), (1, 0), (0, 1), (1, 1))
    children = np.stack([rank[:, h::2, w::2] for h, w in places], -1)  # [P, H, W, 4]
    cell = coarse.reshape(len(coarse), -1).nonzero()[1].reshape(len(coarse), -1, 1)
    row_column = np.stack(np.divmod(cell, coarse.shape[2]), -1)  # [P, M, 1, 2]
    return GroupPartition(
        token_index=torch.from_numpy(children[coarse].reshape(len(fine), -1, 4)),
        window_id=torch.from_numpy(cell.repeat(4, 2).astype(np.int32)),
        coords=torch.from_numpy((2 * row_column + places).astype(np.int32)),
        num_tokens=4 * cell.shape[1],
        window_size=(2, 2),
        shift_size=(0, 0),
        grid_size=fine.shape[1:],
    )
