"""Augmented images by their place in a run.

What is random is a function of the run's seed and a place in the run, see `seeds`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from greenmim.data.augment import Crop, Encoded, draw_crop, read_crop, read_encoded
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
        image: uint8 [3, H, W], or a JPEG to be decoded on the device; None: no file could be read.
        flip: Whether to flip it.
        failures: (path, reason) of files that could not be read.
        path: The file.
    """

    item: Item
    image: torch.Tensor | Encoded | None
    flip: bool
    failures: tuple[tuple[str, str], ...]
    path: str = ""


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
        self.bad: dict[int, str] = {}
        self.config, self.image_size = config, image_size
        self.mean, self.std = list(config.mean), list(config.std)

    def __len__(self) -> int:
        return len(self.source)

    def path(self, index: int) -> str:
        """An image's name for people."""
        return self.source.path(index)

    def check_readable(self) -> None:
        """Find out before the run starts whether anything can be read.

        Raises:
            UserError: the first files are all corrupt.
        """
        crop, failures = self._read(0, self._crop_of(Item(0, 0, 0, 0)))
        self.bad.clear()
        if crop is None:
            raise UserError(self.all_bad(failures))

    def all_bad(self, failures: tuple[tuple[str, str], ...]) -> str:
        """The message when no readable file takes the place of a bad one."""
        return (
            f"No image can be read: {len(failures)} files in a row under {self.source.root} are"
            f" corrupt; the first is {failures[0][0]} ({failures[0][1]})."
        )

    def __getitem__(self, item: Item) -> Sample:
        sample, failures = self._read(item.position % len(self), self._crop_of(item))
        return Sample(item, None, False, failures) if sample is None else sample

    def _crop_of(self, item: Item) -> Callable[[int, tuple[tuple[str, str], ...]], Sample]:
        """What makes the sample of a place in the run from an image of the source."""

        def draw(height: int, width: int) -> Crop:
            # torchvision draws from the global generator, which is left as it was. This is what
            # torch.random.fork_rng does, at a quarter of its time.
            before = torch.get_rng_state()
            try:
                seed = torch_seed(self.seed, CROP, item.epoch, item.position)
                torch.default_generator.manual_seed(seed)
                return draw_crop(height, width, self.config)
            finally:
                torch.set_rng_state(before)

        def read(index: int, failures: tuple[tuple[str, str], ...]) -> Sample:
            file, path = self.source.open(index), self.path(index)
            if self.config.decode == "device" and (encoded := read_encoded(file, draw)):
                return Sample(item, encoded, encoded.crop.flip, failures, path)
            reduced = self.config.decode == "reduced"
            return Sample(item, *read_crop(file, self.image_size, draw, reduced), failures, path)

        return read

    def _read(self, index: int, read: Callable) -> tuple:
        """The sample of an image or of the one that stands in, and the files that failed."""
        failures = []
        for step in range(min(len(self), MAX_BAD_IN_A_ROW)):
            candidate = self.source.stand_in(index, step)
            if candidate not in self.bad:
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # Pillow's notes on odd metadata
                        return read(candidate, tuple(failures)), tuple(failures)
                except Exception as error:  # decoders raise anything on a broken file
                    self.bad[candidate] = " ".join(str(error).split()) or type(error).__name__
            failures.append((self.path(candidate), self.bad[candidate]))
        return None, tuple(failures)
