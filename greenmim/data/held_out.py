"""Held-out images: the middle of each, with the same mask whenever and wherever it is taken."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from greenmim.data.dataset import AugmentedImages, Crop
from greenmim.data.loader import Collate
from greenmim.data.sampler import MASK, Item, MicroBatches, generator
from greenmim.masking import draw_visible


class HeldOutImages(AugmentedImages):
    """A source's images without augmentation, looked up by `Item`."""

    def crop(self, height: int, width: int, item: Item) -> Crop:
        """The largest part of the model's shape in the middle."""
        wanted_height, wanted_width = self.image_size
        scale = min(height / wanted_height, width / wanted_width)
        high = max(1, min(height, round(wanted_height * scale)))
        wide = max(1, min(width, round(wanted_width * scale)))
        return Crop((height - high) // 2, (width - wide) // 2, high, wide, flip=False)


class HeldOutCollate(Collate):
    """Draws the mask of each image by its place among them, whatever batch it is in."""

    def visible(self, items: list[Item]) -> np.ndarray:
        mask, grid = self.mask, self.planner.unit_grid
        # No update of a run has this number.
        rngs = (generator(self.seed, MASK, 2**32, item.position) for item in items)
        return np.stack([draw_visible(rng, grid, mask.ratio, kind=mask.kind) for rng in rngs])


class HeldOutSampler(MicroBatches):
    """Yields one process's part of all images, in batches of one size.

    All processes have as many batches; what is missing at the end is filled with images that do not
    count.

    Args:
        num_images: Images of the source.
        batch_size: Images of a batch.
        rank, world_size: This process and the number of processes.

    Attributes:
        counted: Images of each batch that count, the first ones.
    """

    def __init__(self, num_images: int, batch_size: int, rank: int = 0, world_size: int = 1):
        self.batch_size, self.rank = batch_size, rank
        batches = -(-num_images // (batch_size * world_size))
        # Runs of neighbours, since shards are read from front to back.
        first = rank * batches * batch_size
        places = np.arange(first, first + batches * batch_size).reshape(batches, batch_size)
        self.counted = (places < num_images).sum(1).tolist()
        self._positions = np.minimum(places, num_images - 1)

    def __len__(self) -> int:
        return len(self._positions)

    def __iter__(self) -> Iterator[list[Item]]:
        for number, positions in enumerate(self._positions):
            yield [Item(number, self.rank, 0, int(position)) for position in positions]
