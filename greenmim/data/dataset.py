"""Augmented images by their place in a run.

What is random is a function of the run's seed and a place in the run, see `seeds`.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from greenmim.data.augment import Crop, draw_crop, read_crop
from greenmim.data.errors import hopeless, patiently, reason_of
from greenmim.data.sampler import Item
from greenmim.data.sources import Source
from greenmim.recipe import DataConfig, UserError
from greenmim.seeds import CROP, torch_seed

# A file that cannot be read is replaced by another one; this many bad ones in a row are a broken
# data set.
MAX_BAD_IN_A_ROW = 100


class Sample(NamedTuple):
    """A crop, and failed files.

    Attributes:
        item: Its place in the run.
        image: uint8 [3, H, W]; None: see `stop`.
        flip: Whether to flip it.
        failures: (path, reason) of files that could not be read.
        stop: Why the run cannot go on.
    """

    item: Item
    image: torch.Tensor | None
    flip: bool
    failures: tuple[tuple[str, str], ...]
    stop: str | None = None


class AugmentedImages(Dataset):
    """Augmented images of a source, looked up by `Item`.

    Args:
        source: Where they are from.
        config: Augmentation.
        image_size: (height, width) of the crops in px.
        seed: The run's seed.
    """

    def __init__(
        self, source: Source, config: DataConfig, image_size: tuple[int, int], seed: int
    ) -> None:
        self.source = source
        self.seed = seed
        self.config, self.image_size = config, image_size
        self.mean, self.std = list(config.mean), list(config.std)

    def __len__(self) -> int:
        return len(self.source)

    def path(self, item: Item) -> str:
        """Name, for people, of the image at a place in the run."""
        return self.source.path(self._index(item))

    def check_readable(self) -> list[str]:
        """Find out before the run starts whether anything can be read.

        Returns:
            What people should know of the images.

        Raises:
            UserError: the first files are all corrupt, or nothing could be.
        """
        if stop := self._sample(Item(0, 0, 0, 0)).stop:
            raise UserError(stop)
        return self.source.notes()

    def __getitem__(self, item: Item) -> Sample:
        return self._sample(item)

    def _sample(self, item: Item) -> Sample:
        """The sample of an image or of one that stands in.

        Nothing is remembered of a file that failed: it may have been the network.
        """
        failures: list[tuple[str, str]] = []
        index = self._index(item)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's notes on odd metadata
            for step in range(min(len(self), MAX_BAD_IN_A_ROW)):
                candidate = self.source.stand_in(index, step)
                try:
                    sample = patiently(lambda chosen=candidate: self._read(chosen, item))
                    return sample._replace(failures=tuple(failures))
                except Exception as error:  # decoders raise anything on a broken file
                    path = self.source.path(candidate)
                    if why := hopeless(error):
                        why = f"{path} cannot be read, for {why} ({reason_of(error)})."
                        return Sample(item, None, False, tuple(failures), stop=why)
                    failures.append((path, reason_of(error)))
        why = (
            f"No image can be read: {len(failures)} in a row under {self.source.root} failed;"
            f" the first is {failures[0][0]} ({failures[0][1]})."
        )
        return Sample(item, None, False, tuple(failures), stop=why)

    def _read(self, index: int, item: Item) -> Sample:
        """The crop of an image of the source for a place in the run."""

        def draw(height: int, width: int) -> Crop:
            # From the global generator, which is left as it was. This is what torch.random.fork_rng
            # does, at a quarter of its time.
            before = torch.get_rng_state()
            try:
                seed = torch_seed(self.seed, CROP, item.epoch, item.position)
                torch.default_generator.manual_seed(seed)
                return draw_crop(height, width, self.config)
            finally:
                torch.set_rng_state(before)

        file = self.source.open(index)
        reduce = self.config.decode == "reduced"
        return Sample(item, *read_crop(file, self.image_size, draw, reduce), ())

    def _index(self, item: Item) -> int:
        repeat, position = divmod(item.position, len(self))
        return self.source.at(position, item.epoch * self.config.repeats + repeat)
