"""Augmented images, looked up by where in a run they are needed.

A picture goes from its file to an 8-bit crop in a loader process. The crop is drawn from the
picture's size alone, so that a decoder can do less for it. Flipping, conversion to float and
normalisation (`Finish`) come after, there or on the device.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from greenmim.data.decode import (
    MAX_PIXELS,
    SWAPPED,
    named_chatter,
    opened,
    orientation,
    to_rgb,
    upright,
    upright_size,
    white_of,
)
from greenmim.data.images import Source, hopeless, patiently
from greenmim.data.sampler import CROP, Item, torch_seed
from greenmim.guards import UserError, one_line
from greenmim.recipe import ImagesConfig

# A file that cannot be read is replaced by another one; this many bad ones in a row are a broken
# data set.
MAX_BAD_IN_A_ROW = 100


class Crop(NamedTuple):
    """Part of an upright picture, in its pixels, and whether it is flipped left to right."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


def draw_crop(
    height: int, width: int, config: ImagesConfig, generator: torch.Generator | None = None
) -> Crop:
    """Draw a crop of a picture of so many pixels; without a generator, from torch's global one.

    As torchvision's RandomResizedCrop and RandomHorizontalFlip do, in less than half of their time.
    """
    number, integer = torch.empty(1), torch.empty(1, dtype=torch.int64)

    def uniform(low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return number.uniform_(low, high, generator=generator)

    ratios = _logarithms(tuple(config.crop_ratio))
    for _ in range(10):
        area = height * width * uniform(*config.crop_scale).item()
        ratio = uniform(*ratios).exp_().item()
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            room = height - high, width - wide
            top, left = (int(integer.random_(0, n + 1, generator=generator)) for n in room)
            break
    else:  # the largest crop in the middle
        least, most = config.crop_ratio
        wide = min(width, max(1, round(height * most)))
        high = min(height, max(1, round(width / least)))
        top, left = (height - high) // 2, (width - wide) // 2
    return Crop(top, left, high, wide, flip=uniform().item() < config.flip)


@functools.cache
def _logarithms(values: tuple[float, ...]) -> list[float]:
    return torch.log(torch.tensor(values)).tolist()


def read_crop(
    file: str | os.PathLike | io.BytesIO,
    size: tuple[int, int],
    draw: Callable[[int, int], Crop],
    reduce: bool,
    most: int = MAX_PIXELS,
) -> tuple[torch.Tensor, bool]:
    """Read the crop of a picture, scaled to `size` (height, width) in px.

    Args:
        file: Path, or a file that is open.
        draw: Chooses the crop of a picture of (height, width) px.
        reduce: Let the JPEG decoder make the picture 2, 4 or 8 times smaller where the crop is
            still no smaller than `size`; most of a decoder's work grows with its output.
        most: Pixels of a picture, above which it is refused.

    Returns:
        uint8 [3, height, width], not flipped yet, and whether to flip it.

    Raises:
        OSError and others from Pillow: the file is too large, corrupt, truncated or no image.
    """
    with opened(file, most, "; raise --data.max-pixels to read it") as image:
        if not isinstance(image, JpegImageFile):  # which a phone's MPO is, too
            image.load()  # some formats hold their EXIF block behind the pixels
        lies = orientation(image)
        height, width = upright_size(image, lies)
        crop = draw(height, width)
        if reduce:
            wide = math.ceil(width * size[1] / crop.width)
            high = math.ceil(height * size[0] / crop.height)
            image.draft(None, (high, wide) if lies in SWAPPED else (wide, high))  # JPEGs alone
        image.load()
        white, picture = white_of(image), upright(image, lies)
    right, bottom = crop.left + crop.width, crop.top + crop.height
    if picture.size == (width, height):
        # Cut out before all else: a large picture is large once. Scaling takes a third of the time
        # that it takes in Pillow.
        part = to_rgb(picture.crop((crop.left, crop.top, right, bottom)), white)
        pixels = F.pil_to_tensor(part)
        return F.resize(pixels, list(size), InterpolationMode.BICUBIC, antialias=True), crop.flip
    # The crop does not end at whole pixels of the smaller picture, which Pillow alone can take.
    x, y = picture.width / width, picture.height / height
    # What is left of rounding must not reach over the edge.
    end = min(right * x, picture.width), min(bottom * y, picture.height)
    box = (crop.left * x, crop.top * y, *end)
    scaled = to_rgb(picture, white).resize(size[::-1], Image.Resampling.BICUBIC, box=box)
    return F.pil_to_tensor(scaled), crop.flip


def finishes_in_loader(config: ImagesConfig, device: torch.device) -> bool:
    """Whether images leave the loader finished, or in 8 bits to be finished on the device."""
    # A GPU does in no time what would keep a loader process from loading the next image.
    later = config.augment_on_device
    return device.type != "cuda" if later is None else not later


class Finish:
    """Flips, conversion to float and normalisation, for batches on a device."""

    def __init__(self, config: ImagesConfig, device: torch.device | str = "cpu") -> None:
        # Tensors: a list would be copied to the device at every call. In units of 8-bit pixels.
        self.mean, self.std = (
            torch.tensor(values, device=device).mul_(255).view(3, 1, 1)
            for values in (config.mean, config.std)
        )

    def __call__(self, images: torch.Tensor, flips: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, H, W], bool [B] -> float32 [B, 3, H, W], in this order in memory."""
        images = torch.where(flips[:, None, None, None], images.flip(3), images)
        images = images.to(torch.float32, memory_format=torch.contiguous_format)
        # In place: with F.to_dtype and F.normalize it took four times as long.
        return images.sub_(self.mean).div_(self.std)

    def into(self, out: torch.Tensor, image: torch.Tensor, flip: bool) -> None:
        """The same of one image, uint8 [3, H, W], into float32 [3, H, W]."""
        out.copy_(image.flip(2) if flip else image).sub_(self.mean).div_(self.std)


def normalise(picture: Image.Image, mean: list[float], std: list[float]) -> torch.Tensor:
    """PIL picture to a normalised tensor float32 [3, H, W]."""
    return F.normalize(F.to_dtype(F.pil_to_tensor(picture), torch.float32, scale=True), mean, std)


class Sample(NamedTuple):
    """A crop, and failed files."""

    item: Item  # where in the run it is needed
    image: torch.Tensor  # uint8 [3, H, W]; None where there is a reason to stop
    flip: bool  # whether it is still to be flipped
    failures: tuple[tuple[str, str], ...]  # (path, reason) of files that could not be read
    stop: str | None = None  # why the run cannot go on
    label: str | None = None  # its class, where that was asked for and is known


class NotWanted(Exception):
    """An image that is no candidate after all."""


class AugmentedImages(Dataset):
    """Augmented images of a source, of `image_size` (height, width) in px, looked up by `Item`."""

    def __init__(
        self, source: Source, config: ImagesConfig, image_size: tuple[int, int], seed: int
    ) -> None:
        self.source, self.config, self.image_size, self.seed = source, config, image_size, seed
        self.mean, self.std = list(config.mean), list(config.std)

    def __len__(self) -> int:
        return len(self.source)

    def path(self, item: Item) -> str:
        return self.source.path(self._index(item))

    def check_readable(self) -> list[str]:
        """What people should know of the images; UserError where none of the first can be read."""
        if stop := self._sample(Item(0, 0, 0, 0)).stop:
            raise UserError(stop)
        return self.source.notes()

    def __getitem__(self, item: Item) -> Sample:
        return self._sample(item)

    def _sample(self, item: Item) -> Sample:
        """The sample of an image, or of one that stands in.

        Nothing is remembered of a file that failed: it may have been the network.
        """
        failures: list[tuple[str, str]] = []
        stop = None
        for candidate in itertools.islice(self._candidates(item), MAX_BAD_IN_A_ROW):
            try:
                sample = patiently(functools.partial(self._read, candidate, item))
                failures += self.source.take_damaged()
                return sample._replace(failures=tuple(failures))
            except NotWanted:
                continue
            except Exception as error:  # decoders raise anything on a broken file
                path = self.source.path(candidate)
                if why := hopeless(error):
                    stop = f"{path} cannot be read, for {why} ({one_line(error)})."
                    break
                failures.append((path, one_line(error)))
        if not failures and stop is None:
            stop = self.none_to_read()
        stop = stop or (
            f"No image can be read: {len(failures)} in a row under {self.source.root} failed;"
            f" the first is {failures[0][0]} ({failures[0][1]})."
        )
        # `stop` is checked before anything else is used.
        return Sample(item, None, False, tuple(failures), stop)  # type: ignore[arg-type]

    def _candidates(self, item: Item) -> Iterator[int]:
        """The image, and those that may stand in."""
        index = self._index(item)
        return (self.source.stand_in(index, step) for step in range(len(self)))

    def none_to_read(self) -> str:
        """Why there was no candidate."""
        return f"There is no image in {self.source.root}."

    def crop(self, height: int, width: int, item: Item) -> Crop:
        """The part that is taken of a picture of so many pixels."""
        generator = torch.Generator()
        generator.manual_seed(torch_seed(self.seed, CROP, item.epoch, item.position))
        return draw_crop(height, width, self.config, generator)

    def _read(self, index: int, item: Item) -> Sample:
        draw = functools.partial(self.crop, item=item)
        reduce = self.config.decode == "reduced"
        file = self.source.open(index)
        with named_chatter(lambda: self.source.path(index)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's notes on odd metadata
            crop = read_crop(file, self.image_size, draw, reduce, self.config.max_pixels)
        return Sample(item, *crop, ())

    def _index(self, item: Item) -> int:
        repeat, position = divmod(item.position, len(self))
        return self.source.at(position, item.epoch * self.config.repeats + repeat)
