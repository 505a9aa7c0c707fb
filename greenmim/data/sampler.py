"""Which images every process computes at every update."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from greenmim.seeds import ORDER, generator

# Shards are read in so many places for each micro-batch of an update, and images are shuffled
# within so many of each place. A shard is read by one loader process if their number divides the
# places; the order must not depend on it.
PLACES, WINDOW = 8, 1024


class Item(NamedTuple):
    """One image: the update in the run and the micro-batch in it (from 0), the epoch, the position.

    The position is the image's index, plus the number of images for every repeat.
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
        num_images: Images in the data set.
        batch_size: Images per micro-batch.
        repeats: Times the data set is gone through in an epoch.
        epochs: Epochs of the run.
        accumulate: Micro-batches of a process per update.
        seed: The run's seed.
        rank, world_size: This process and the number of processes.
        first_update: Update to start from.
        shards: int [number of shards], images of each, to read neighbours together (see
            `shard_order`); None for any order.

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
        shards: np.ndarray | None = None,
    ) -> None:
        self.positions = num_images * repeats
        self.batch_size, self.accumulate, self.epochs = batch_size, accumulate, epochs
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.first_update = first_update
        self.shards = None if shards is None else np.tile(shards, repeats)
        self._kept: tuple[int, np.ndarray] | None = None
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
                f"The data set holds {num_images} image{plural} (x {repeats} repeats), fewer than"
                f" the {self.images_per_update} of one update; {advice}."
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
        # Kept, for an order takes seconds where there are many millions of images.
        if self._kept is None or self._kept[0] != epoch:
            self._kept = epoch, self._new_order(epoch)
        return self._kept[1]

    def _new_order(self, epoch: int) -> np.ndarray:
        rng = generator(self.seed, ORDER, epoch)
        if self.shards is None:
            return rng.permutation(self.positions)
        micro_batches = self.images_per_update // self.batch_size
        batches = self.updates_per_epoch * micro_batches
        return shard_order(rng, self.shards, batches, self.batch_size, PLACES * micro_batches)

    def _items(self, order: np.ndarray, step: int, micro: int) -> list[Item]:
        epoch, update = divmod(step, self.updates_per_epoch)
        start = update * self.images_per_update + micro * self.batch_size
        chosen = order[start : start + self.batch_size]
        return [Item(step, micro, epoch, int(position)) for position in chosen]


def shard_order(
    rng: np.random.Generator, shards: np.ndarray, batches: int, batch_size: int, places: int
) -> np.ndarray:
    """An order of images that goes through shards in a few places at a time.

    The shards are put in a ring, in random order, which is cut anywhere; the row is cut into as
    many equal parts as there are places; batches come from the parts in turn, shuffled within
    windows along each. No image comes twice; what is too much at the row's end is left out.

    Args:
        rng: Draws the order.
        shards: int [number of shards], images of each.
        batches, batch_size: What to fill; no more than there is.
        places: Number of places.

    Returns:
        int64 [batches * batch_size].
    """
    chosen = rng.permutation(len(shards))
    lengths = shards[chosen]
    first = (np.cumsum(shards) - shards)[chosen]
    row = np.arange(lengths.sum()) + np.repeat(first - (np.cumsum(lengths) - lengths), lengths)
    row = np.roll(row, rng.integers(len(row)))  # else the ends of shards are left out most often
    order = np.empty((batches, batch_size), dtype=np.int64)
    begin = 0
    for place in range(places):
        filled = order[place::places]
        part = row[begin : begin + filled.size]
        for start in range(0, len(part), WINDOW):
            rng.shuffle(part[start : start + WINDOW])
        filled[:] = part.reshape(filled.shape)
        begin += filled.size
    return order.reshape(-1)
