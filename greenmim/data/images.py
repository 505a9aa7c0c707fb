"""Finding image files and opening them as three-channel pictures."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from greenmim.recipe import UserError

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif")
)

_ORIENTATION_TAG = 0x0112  # of EXIF
# What puts a picture upright, by the tag.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPPED = (5, 6, 7, 8)  # height and width


class Names:
    """Names of files by their number, in two pieces of memory.

    So loader processes share it, which they do not share a list's strings, however many millions
    there are; and a single long name takes no more than itself.
    """

    def __init__(self, names: Iterable[bytes]) -> None:
        names = list(names)
        self._ends = np.cumsum([0, *map(len, names)], dtype=np.int64)
        self._bytes = b"".join(names)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> str:
        return os.fsdecode(self._bytes[self._ends[number] : self._ends[number + 1]])

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))


def find_images(root: str | Path) -> Names:
    """Every image file under a folder, at any depth, in sorted order.

    Hidden files and folders are left out; linked folders are followed, each once.

    Returns:
        Paths relative to `root`.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        NotADirectoryError: `root` is a file.
        UserError: a folder in it cannot be listed.
    """

    def refused(error: OSError) -> None:
        raise UserError(
            f"The folder {error.filename} cannot be listed ({error.strerror}); give it permission"
            f" to be read, or take it out of {root}."
        ) from error

    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"There is no folder {root}; pass the folder with the images.")
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is a file; pass the folder with the images.")
    names: list[bytes] = []
    seen: set[str] = set()
    for folder, subfolders, files in os.walk(root, onerror=refused, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        inside = os.path.relpath(folder, root)
        inside = "" if inside == "." else os.path.join(inside, "")
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                names.append(os.fsencode(inside + name))
    if not names:
        raise FileNotFoundError(
            f"There is no image in {root}; looked at any depth for"
            f" {', '.join(sorted(IMAGE_SUFFIXES))}."
        )
    return Names(sorted(names))


def open_rgb(file: str | Path | io.BytesIO) -> Image.Image:
    """Open any picture as 8-bit RGB.

    Upright by its EXIF tag, transparency laid on white, 16 bits scaled to 8.

    Raises:
        OSError and others from Pillow: the file is corrupt, truncated or no image.
    """
    with Image.open(file) as image:
        image.load()  # some formats hold their EXIF block behind the pixels
        return to_rgb(upright(image, orientation(image)))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded picture of any mode to 8-bit RGB, see `open_rgb`."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit values at 255, which turns such pictures white.
        values = np.clip(np.asarray(image, dtype=np.float64) / 257.0, 0, 255)
        image = Image.fromarray(np.round(values).astype(np.uint8))
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        scale = 255.0 if values.size and values.max() <= 1.0 else 1.0
        image = Image.fromarray(np.round(np.clip(values * scale, 0, 255)).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        opaque = image.convert("RGBA")
        white = Image.new("RGBA", opaque.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, opaque).convert("RGB")
    return image.convert("RGB")


def orientation(image: Image.Image) -> int:
    """How a picture lies, 1 to 8 as EXIF numbers it; 1, upright, where it does not say."""
    try:
        tag = image.getexif().get(_ORIENTATION_TAG, 1)
        return tag if tag in _TURNS else 1
    except Exception:  # a broken EXIF block raises anything; the pixels are still good
        return 1


def upright_size(image: Image.Image, lies: int) -> tuple[int, int]:
    """(height, width) of a picture once `upright`."""
    return image.size if lies in SWAPPED else image.size[::-1]


def upright(image: Image.Image, lies: int) -> Image.Image:
    """A loaded picture with this `orientation`, turned; the same one where it need not be.

    Pillow's exif_transpose writes the EXIF block anew, which fails where it is broken, and copies a
    picture that it does not turn.
    """
    return image.transpose(_TURNS[lies]) if lies in _TURNS else image


def open_fitted(file: str | Path | io.BytesIO, size: tuple[int, int]) -> Image.Image:
    """The middle of any picture as 8-bit RGB, scaled to `size` (height, width) in px.

    Raises:
        OSError and others from Pillow: the file is corrupt, truncated or no image.
    """
    return ImageOps.fit(open_rgb(file), size[::-1], Image.Resampling.BICUBIC)
