"""JPEGs decoded where the model is, by torchvision (nvJPEG on CUDA).

torchvision 0.29 calls its decoders deprecated, so they are imported where they are used alone.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from greenmim.data.augment import Crop
from greenmim.data.errors import reason_of
from greenmim.data.images import open_rgb
from greenmim.data.sampler import Item
from greenmim.messages import first_line


class EncodedBatch(NamedTuple):
    """The JPEGs of a batch.

    Attributes:
        data: uint8 [bytes], one file after the other.
        sizes: Bytes of each.
        places: Which image of the batch each is.
        crops: Of the decoded picture.
        items: Their places in the run.
        paths: For messages.
    """

    data: torch.Tensor
    sizes: list[int]
    places: list[int]
    crops: list[Crop]
    items: list[Item]
    paths: list[str]


def decode_into(images: torch.Tensor, encoded: EncodedBatch) -> list[tuple[int, str]]:
    """Decode, crop and scale the JPEGs into their places.

    What torchvision cannot decode is left to Pillow.

    Args:
        images: uint8 [B, 3, H, W] on the device, changed in place.
        encoded: What to decode; on the CPU.

    Returns:
        (number in `encoded`, reason) of those that cannot be decoded; their places are left alone.
    """
    files = list(encoded.data.split(encoded.sizes))
    try:
        pictures = _decode(files, images.device)
    except RuntimeError:  # says that one of them is bad, not which
        pictures = [_decoded(file, images.device) for file in files]
    failures = []
    for number, picture in enumerate(pictures):
        if isinstance(picture, str):
            failures.append((number, picture))
            continue
        box, size = encoded.crops[number][:4], list(images.shape[2:])
        images[encoded.places[number]] = F.resized_crop(
            picture, *box, size, InterpolationMode.BICUBIC, antialias=True
        )
    return failures


def _decoded(file: torch.Tensor, device: torch.device) -> torch.Tensor | str:
    try:
        return _decode([file], device)[0]
    except RuntimeError:
        pass
    try:
        return F.pil_to_tensor(open_rgb(io.BytesIO(file.numpy().tobytes()))).to(device)
    except Exception as error:  # decoders raise anything on a broken file
        return reason_of(error)


def _decode(files: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(files, ImageReadMode.RGB, device=device)


def check_device(device: torch.device) -> None:
    """Raises ValueError where torchvision cannot decode on a device."""
    if device.type == "cpu":
        raise ValueError("--data.decode device needs a CUDA GPU; on the CPU take reduced.")
    try:
        from torchvision.io import encode_jpeg

        _decode([encode_jpeg(torch.zeros(1, 8, 8, dtype=torch.uint8))], device)
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"--data.decode device: torchvision cannot decode JPEGs on this GPU"
            f" ({first_line(error)}); take --data.decode reduced."
        ) from error
