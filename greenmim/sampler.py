"""Which images every process computes at every update."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from greenmim.seeds import ORDER, generator


class Item(NamedTuple):
    """One image: the update in the run and the micro-batch in it (from 0), the epoch, the position.

    The position is the file's index, plus the number of files for every repeat.
    """

    step: int
    micro: int
    epoch: int
    position: int


class EpochSampler(Sampler[list[Item]]):
    """Yields the micro-batches of one process, from a given update of the run to its end.

    An epoch is a new order of `num_images * repeats` positions, cut into global batches of
    `world_size * accumulate` micro-batches of `batch_size` images; what is left at its end, less
    than a global batch, is dropped. Part p of process r is micro-batch `p * world_size + r`, so a
    global batch does not depend on how many processes share it.

    Args:
        num_images: Files in the folder.
        batch_size: Images per micro-batch.
        repeats: Times the folder is gone through in an epoch.
        epochs: Epochs of the run.
        accumulate: Micro-batches of a process per update.
        seed: The run's seed.
        rank, world_size: This process and the number of processes.
        first_update: Update to start from.

    Raises:
        ValueError: an epoch does not fill one update.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        repeats: int = 1,
        epochs: int = 1,
        accumulate: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        first_update: int = 0,
    ) -> None:
        self.positions = num_images * repeats
        self.batch_size, self.accumulate, self.epochs = batch_size, accumulate, epochs
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.first_update = first_update
        self.images_per_update = batch_size * accumulate * world_size
        self.updates_per_epoch = self.positions // self.images_per_update
        self.left_out = self.positions - self.updates_per_epoch * self.images_per_update
        if self.updates_per_epoch == 0:
            advice = f"raise --data.repeats to at least {-(-self.images_per_update // num_images)}"
            largest = self.positions // (accumulate * world_size)
            if largest:
                advice = f"lower --data.batch-size to {largest} or less, or {advice}"
            plural = "s" if num_images != 1 else ""
            raise ValueError(
                f"The folder holds {num_images} image{plural} (x {repeats} repeats), fewer than the"
                f" {self.images_per_update} of one update; {advice}."
            )

    def __len__(self) -> int:
        return (self.epochs * self.updates_per_epoch - self.first_update) * self.accumulate

    def __iter__(self) -> Iterator[list[Item]]:
        for epoch in range(self.first_update // self.updates_per_epoch, self.epochs):
            order = self._order(epoch)
            first = epoch * self.updates_per_epoch
            for step in range(max(self.first_update, first), first + self.updates_per_epoch):
                for part in range(self.accumulate):
                    yield self._items(order, step, self.micro(part))

    def micro(self, part: int) -> int:
        """Index in the global batch of this process's part, from 0."""
        return part * self.world_size + self.rank

    def items(self, step: int, micro: int) -> list[Item]:
        """Any micro-batch of any update, whoever computes it."""
        return self._items(self._order(step // self.updates_per_epoch), step, micro)

    def _order(self, epoch: int) -> np.ndarray:
        return generator(self.seed, ORDER, epoch).permutation(self.positions)

    def _items(self, order: np.ndarray, step: int, micro: int) -> list[Item]:
        epoch, update = divmod(step, self.updates_per_epoch)
        start = update * self.images_per_update + micro * self.batch_size
        chosen = order[start : start + self.batch_size]
        return [Item(step, micro, epoch, int(position)) for position in chosen]
