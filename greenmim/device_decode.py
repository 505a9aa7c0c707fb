"""JPEGs decoded where the model is, by torchvision (nvJPEG on CUDA)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from greenmim.augment import Crop


class EncodedBatch(NamedTuple):
    """The JPEGs of a batch.

    Attributes:
        data: uint8 [bytes], one file after the other.
        sizes: Bytes of each.
        places: Which image of the batch each is.
        crops: Of the decoded picture.
        paths: For messages.
    """

    data: torch.Tensor
    sizes: list[int]
    places: list[int]
    crops: list[Crop]
    paths: list[str]


def decode_into(
    images: torch.Tensor, encoded: EncodedBatch
) -> tuple[tuple[tuple[str, str], ...], bool]:
    """Decode, crop and scale the JPEGs into their places.

    One that is corrupt is replaced by the image before it in the batch.

    Args:
        images: uint8 [B, 3, H, W] on the device, changed in place.
        encoded: What to decode; on the CPU.

    Returns:
        (path, reason) of files that cannot be decoded, and whether any image is good.
    """
    files = list(encoded.data.split(encoded.sizes))
    try:
        pictures = decode_jpeg(files, ImageReadMode.RGB, device=images.device)
    except RuntimeError:  # says that one of them is bad, not which
        pictures = [_decoded(file, images.device) for file in files]
    failures, bad = [], []
    for picture, place, crop, path in zip(
        pictures, encoded.places, encoded.crops, encoded.paths, strict=True
    ):
        if isinstance(picture, str):
            failures.append((path, picture))
            bad.append(place)
            continue
        box, size = crop[:4], list(images.shape[2:])
        images[place] = F.resized_crop(
            picture, *box, size, InterpolationMode.BICUBIC, antialias=True
        )
    good = [place for place in range(len(images)) if place not in bad]
    for place in bad if good else ():
        before = [other for other in good if other < place]
        images[place] = images[before[-1] if before else good[-1]]
    return tuple(failures), bool(good)


def _decoded(file: torch.Tensor, device: torch.device) -> torch.Tensor | str:
    try:
        return decode_jpeg([file], ImageReadMode.RGB, device=device)[0]
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]


def check_device(device: torch.device) -> None:
    """Raises ValueError where torchvision cannot decode on a device."""
    if device.type == "cpu":
        raise ValueError("--data.decode device needs a CUDA GPU; on the CPU take reduced.")
    try:
        smallest = encode_jpeg(torch.zeros(1, 8, 8, dtype=torch.uint8))
        decode_jpeg([smallest], ImageReadMode.RGB, device=device)
    except RuntimeError as error:
        raise ValueError(
            f"--data.decode device: torchvision cannot decode JPEGs on this GPU"
            f" ({str(error).strip().splitlines()[0]}); take --data.decode reduced."
        ) from error
