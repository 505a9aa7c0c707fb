"""Which images every process computes at every update, and where random numbers come from.

All that is random in a run is a function of its seed and of where in the run it is drawn: the order
of an epoch of (seed, epoch), a crop of (seed, epoch, position), a mask, how images are mixed and
what a forward pass draws itself of (seed, step, micro-batch in the global batch). So neither the
number of processes nor that of loader workers matters, and a run can be taken up anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from greenmim.data.images import Source
from greenmim.recipe import RunRecipe

# Streams of random numbers, which must not repeat one another; each has one for every key.
ORDER, CROP, MASK, FORWARD, AUGMENT, MIX, STAND_IN = 1, 2, 3, 4, 5, 6, 7
# A micro-batch of an update is read by so many readers, each from shards of its own, and images are
# shuffled within so many of a reader's. A shard is opened by one loader process if their number
# divides that of the readers; the order must not depend on it.
READERS, WINDOW = 8, 1024


def generator(seed: int, stream: int, *key: int) -> np.random.Generator:
    """A NumPy generator for one place in a run: same arguments, same numbers."""
    return np.random.default_rng((seed, stream, *key))


def torch_seed(seed: int, stream: int, *key: int) -> int:
    """A seed of PyTorch for one place in a run, in [0, 2**63)."""
    sequence = np.random.SeedSequence((seed, stream, *key))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


class Item(NamedTuple):
    """One image: its update and micro-batch, from 0; its epoch; its position in the epoch."""

    step: int
    micro_batch: int
    epoch: int
    position: int  # the image's index, plus the number of images for every repeat


class MicroBatches(Sampler[list[Item]]):
    """The micro-batches of one process; `accumulate` of them make an update."""

    accumulate = 1


class EpochSampler(MicroBatches):
    """Yields the micro-batches of one process, from a given update of the run to its end.

    An epoch is a new order of `num_images * repeats` positions, cut into global batches of
    `world_size * accumulate` micro-batches of `batch_size` images; an incomplete last global batch
    is dropped. Process r computes the micro-batches r, r + world_size and so
    on: a global batch does not depend on how many processes share it.

    Args:
        num_images: Images in the dataset, which an epoch goes through `repeats` times.
        batch_size: Images per micro-batch.
        accumulate: Micro-batches of a process per update.
        rank, world_size: This process and the number of processes.
        first_update: Update to start from, from 0.
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
        self._last: tuple[int, np.ndarray] | None = None
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

    @classmethod
    def of(cls, recipe: RunRecipe, source: Source, rank: int, world_size: int) -> EpochSampler:
        """The order of a run's images."""
        data, accumulate = recipe.data, recipe.optim.accumulate
        return cls(
            len(source), data.batch_size, repeats=data.repeats, epochs=recipe.epochs,
            accumulate=accumulate, seed=recipe.seed, rank=rank, world_size=world_size,
            shards=source.shards,
        )  # fmt: skip

    @property
    def total_updates(self) -> int:
        """Updates of the whole run."""
        return self.epochs * self.updates_per_epoch

    def __len__(self) -> int:
        return (self.total_updates - self.first_update) * self.accumulate

    def __iter__(self) -> Iterator[list[Item]]:
        for epoch in range(self.first_update // self.updates_per_epoch, self.epochs):
            order = self._order(epoch)
            first = epoch * self.updates_per_epoch
            for step in range(max(self.first_update, first), first + self.updates_per_epoch):
                for index in range(self.accumulate):
                    yield self._items(order, step, self.micro_batch(index))

    def micro_batch(self, index: int) -> int:
        """Number in the global batch of this process's micro-batch `index`; both from 0."""
        return index * self.world_size + self.rank

    def items(self, step: int, micro_batch: int) -> list[Item]:
        """Any micro-batch of any update."""
        return self._items(self._order(step // self.updates_per_epoch), step, micro_batch)

    def _order(self, epoch: int) -> np.ndarray:
        # Kept, for an order takes seconds where there are many millions of images.
        if self._last is None or self._last[0] != epoch:
            self._last = epoch, self._new_order(epoch)
        return self._last[1]

    def _new_order(self, epoch: int) -> np.ndarray:
        rng = generator(self.seed, ORDER, epoch)
        if self.shards is None:
            return rng.permutation(self.positions)
        of_an_update = self.images_per_update // self.batch_size
        batches = self.updates_per_epoch * of_an_update
        return shard_order(rng, self.shards, batches, self.batch_size, READERS * of_an_update)

    def _items(self, order: np.ndarray, step: int, micro_batch: int) -> list[Item]:
        epoch, update = divmod(step, self.updates_per_epoch)
        start = update * self.images_per_update + micro_batch * self.batch_size
        chosen = order[start : start + self.batch_size]
        return [Item(step, micro_batch, epoch, int(position)) for position in chosen]


def shard_order(
    rng: np.random.Generator, shards: np.ndarray, batches: int, batch_size: int, readers: int
) -> np.ndarray:
    """An order of images in which a few readers go through shards side by side.

    The shards are put in a ring, in random order, which is cut anywhere; the row is cut into equal
    parts, one for each reader; batches come from the readers in turn, shuffled within windows along
    each part. No image comes twice; what is too much at the row's end is left out.

    `shards` are the images of each; there are enough for all batches.

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
    for reader in range(readers):
        filled = order[reader::readers]
        part = row[begin : begin + filled.size]
        for start in range(0, len(part), WINDOW):
            rng.shuffle(part[start : start + WINDOW])
        filled[:] = part.reshape(filled.shape)
        begin += filled.size
    return order.reshape(-1)
