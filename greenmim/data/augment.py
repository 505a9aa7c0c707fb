"""Random crops: drawn from a picture's size alone, so that a decoder can do less for them.

A picture goes from its file to an 8-bit crop in a loader process; flipping, conversion to float and
normalisation (`Finish`) come after, there or on the device.
"""

from __future__ import annotations

import functools
import io
import math
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from greenmim.data.images import SWAPPED, orientation, to_rgb, upright, upright_size
from greenmim.recipe import DataConfig


class Crop(NamedTuple):
    """Part of an upright picture, in its pixels, and whether it is flipped left to right."""

    top: int
    left: int
    height: int
    width: int
    flip: bool

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom), as Pillow has it."""
        return self.left, self.top, self.left + self.width, self.top + self.height


def draw_crop(height: int, width: int, config: DataConfig) -> Crop:
    """Draw a crop of a picture of so many pixels, from torch's global generator.

    The same numbers as torchvision's RandomResizedCrop and RandomHorizontalFlip draw, in less than
    half of their time.
    """
    number, place = torch.empty(1), torch.empty(1, dtype=torch.int64)
    ratios = _logarithms(tuple(config.crop_ratio))
    for _ in range(10):
        area = height * width * number.uniform_(*config.crop_scale).item()
        ratio = number.uniform_(*ratios).exp_().item()
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            top, left = (
                place.random_(0, free + 1).item() for free in (height - high, width - wide)
            )
            break
    else:  # the largest crop in the middle
        least, most = config.crop_ratio
        wide, high = min(width, round(height * most)), min(height, round(width / least))
        top, left = (height - high) // 2, (width - wide) // 2
    return Crop(top, left, high, wide, flip=number.uniform_().item() < config.flip)


@functools.cache
def _logarithms(values: tuple[float, ...]) -> list[float]:
    return torch.log(torch.tensor(values)).tolist()


def read_crop(
    file: str | os.PathLike | io.BytesIO,
    size: tuple[int, int],
    draw: Callable[[int, int], Crop],
    reduce: bool,
) -> tuple[torch.Tensor, bool]:
    """Read the crop of a picture, scaled to `size`.

    Args:
        file: Path, or a file that is open.
        size: (height, width) in px.
        draw: Chooses the crop of a picture of (height, width) px.
        reduce: Let the JPEG decoder make the picture 2, 4 or 8 times smaller where the crop is
            still no smaller than `size`; most of a decoder's work grows with its output.

    Returns:
        uint8 [3, height, width], not flipped yet, and whether to flip it.

    Raises:
        OSError and others from Pillow: the file is corrupt, truncated or no image.
    """
    with Image.open(file) as image:
        if not isinstance(image, JpegImageFile):  # which a phone's MPO is, too
            image.load()  # some formats hold their EXIF block behind the pixels
        lies = orientation(image)
        height, width = upright_size(image, lies)
        crop = draw(height, width)
        if reduce:
            needed = (
                math.ceil(width * size[1] / crop.width),
                math.ceil(height * size[0] / crop.height),
            )
            image.draft(None, needed[::-1] if lies in SWAPPED else needed)  # for JPEGs alone
        image.load()
        picture = to_rgb(upright(image, lies))
    if picture.size == (width, height):
        # A third of the time that Pillow takes to scale it.
        pixels = F.pil_to_tensor(picture.crop(crop.box))
        return F.resize(pixels, list(size), InterpolationMode.BICUBIC, antialias=True), crop.flip
    # The crop does not end at whole pixels of the smaller picture, which Pillow alone can take.
    x, y = picture.width / width, picture.height / height
    left, top, right, bottom = crop.box
    # What is left of rounding must not reach over the edge.
    box = (left * x, top * y, min(right * x, picture.width), min(bottom * y, picture.height))
    scaled = picture.resize(size[::-1], Image.Resampling.BICUBIC, box=box)
    return F.pil_to_tensor(scaled), crop.flip


def finishes_in_loader(config: DataConfig, device: torch.device) -> bool:
    """Whether images leave the loader finished, or in 8 bits to be finished on the device."""
    # A GPU does in no time what would keep a loader process from loading the next image.
    later = config.augment_on_device
    return device.type != "cuda" if later is None else not later


class Finish:
    """Flips, conversion to float and normalisation, for a batch.

    Args:
        config: Mean and deviation.
        device: Where the batches are.
    """

    def __init__(self, config: DataConfig, device: torch.device | str = "cpu") -> None:
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
