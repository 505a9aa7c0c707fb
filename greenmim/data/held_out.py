"""Held-out images: the middle of each, in the source's order, with the same masks every time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from greenmim.data.dataset import AugmentedImages, Crop
from greenmim.data.sampler import Item


class HeldOutImages(AugmentedImages):
    """A source's images without augmentation, looked up by `Item`."""

    def crop(self, height: int, width: int, item: Item) -> Crop:
        """The largest part of the model's shape in the middle."""
        wanted_height, wanted_width = self.image_size
        scale = min(height / wanted_height, width / wanted_width)
        high = max(1, min(height, round(wanted_height * scale)))
        wide = max(1, min(width, round(wanted_width * scale)))
        return Crop((height - high) // 2, (width - wide) // 2, high, wide, flip=False)


class HeldOutSampler(Sampler[list[Item]]):
    """Yields one process's part of all images, in batches; what is drawn depends on their number.

    Where the processes do not divide the images, the last of them take some twice, so that all have
    as many batches.

    Args:
        num_images: Images of the source.
        batch_size: Images of a batch; the last one has those that are left.
        rank, world_size: This process and the number of processes.
    """

    accumulate = 1

    def __init__(self, num_images: int, batch_size: int, rank: int = 0, world_size: int = 1):
        self.batch_size, self.rank = batch_size, rank
        each = -(-num_images // world_size)
        # Runs of neighbours, since shards are read from front to back.
        self._positions = np.arange(rank * each, (rank + 1) * each) % num_images

    def __len__(self) -> int:
        return -(-len(self._positions) // self.batch_size)

    def __iter__(self) -> Iterator[list[Item]]:
        for number in range(len(self)):
            start = number * self.batch_size
            chosen = self._positions[start : start + self.batch_size]
            yield [Item(number, self.rank, 0, int(position)) for position in chosen]
