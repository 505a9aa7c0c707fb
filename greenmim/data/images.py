"""Images of a folder: finding them, opening them as RGB, and what an error of reading says."""

from __future__ import annotations

import errno
import io
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from greenmim.guards import UserError, one_line

T = TypeVar("T")
IMAGE_SUFFIXES = frozenset(".jpg .jpeg .jfif .png .ppm .pgm .bmp .tif .tiff .webp .gif".split())
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
    """Names of files by their number, in two pieces of memory, which loader processes share.

    A list's strings they do not share, and there may be millions.
    """

    def __init__(self, names: Iterable[bytes]) -> None:
        names = list(names)
        self._ends = np.cumsum([0, *map(len, names)], dtype=np.int64)
        self._bytes = b"".join(names)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> str:
        return os.fsdecode(self._bytes[self._ends[number] : self._ends[number + 1]])


def find_images(root: str | Path) -> Names:
    """Every image file under a folder, at any depth, as sorted paths relative to it.

    Hidden files and folders are left out; linked folders are followed, each once.

    Raises:
        UserError: no such folder, no image in it, or a folder in it cannot be listed.
    """

    def refused(error: OSError) -> None:
        raise UserError(
            f"The folder {error.filename} cannot be listed ({error.strerror}); give it permission"
            f" to be read, or take it out of {root}."
        ) from error

    root = Path(root)
    if not root.exists():
        raise UserError(f"There is no folder {root}; pass the folder with the images.")
    if not root.is_dir():
        raise UserError(f"{root} is a file; pass the folder with the images.")
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
        raise UserError(
            f"There is no image in {root}; looked at any depth for"
            f" {', '.join(sorted(IMAGE_SUFFIXES))}."
        )
    return Names(sorted(names))


class Source:
    """Images by index, from 0, read in any order unless a kind of source says otherwise.

    A kind of its own has a length, and

    - root: what it was asked for by;
    - path(index): the image's name for people;
    - open(index): a file's path, or its bytes in a file; raises anything if it cannot be read.

    Attributes:
        shards: int64 [number of shards], images of each, where neighbours are to be read together;
            None where any order is as good.
    """

    shards: np.ndarray | None = None

    def expect(self, readers: int) -> None:
        """Told before reading: so many readers of the order a process will serve side by side."""

    def at(self, position: int, turn: int) -> int:
        """Index of the image at a position below the length, in the pass number `turn`, from 0."""
        return position

    def stand_in(self, index: int, step: int) -> int:
        """The index to try as number `step` in the place of one that cannot be read: the next."""
        return (index + step) % len(self)

    def some(self, count: int) -> list[int]:
        """Indices of a few images to look at: evenly spaced ones."""
        count = min(count, len(self))
        return [index * len(self) // count for index in range(count)]

    def notes(self) -> list[str]:
        """What people should know before a run, once its first image was read."""
        return []


class Folder(Source):
    """Every image file under a folder (see `find_images`)."""

    def __init__(self, root: str) -> None:
        self.root, self.names = root, find_images(root)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])

    open = path


def open_rgb(file: str | Path | io.BytesIO) -> Image.Image:
    """Open any picture as 8-bit RGB, upright, transparency laid on white, 16 bits scaled to 8.

    A corrupt, truncated or other file raises OSError, or others from Pillow.
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
    """The middle of any picture, scaled to `size` (height, width) in px; raises as `open_rgb`."""
    return ImageOps.fit(open_rgb(file), size[::-1], Image.Resampling.BICUBIC)


# ---- errors of reading --------------------------------------------------------------------------

# Seconds to wait before a file is tried again that the system had an error with.
PAUSES = (0.1, 0.5, 2.0)
_FULL = "a disk is full: make room, or set TMPDIR to a larger one"
_MANY = "too many files are open: raise the limit (ulimit -n), or lower --data.workers"
_MEMORY = "memory ran out: lower --data.workers or --data.batch-size"
# No other file would fare better.
_HOPELESS = {errno.ENOSPC: _FULL, errno.EDQUOT: _FULL, errno.ENOMEM: _MEMORY}
_HOPELESS |= {errno.EMFILE: _MANY, errno.ENFILE: _MANY}
# Asked again at once, the system would say the same.
_DEFINITE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}
_DEFINITE |= {errno.EACCES, errno.EPERM}


class Unavailable(OSError):
    """A file that could not be opened, and is not tried again for a while."""


def hopeless(error: Exception) -> str | None:
    """Why no other file would fare better and what to do; None where one may."""
    if isinstance(error, OSError):
        return _HOPELESS.get(error.errno)
    # PyTorch has no class for it.
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return _MEMORY
    return None


def reason_of(error: Exception) -> str:
    """What an error says, in one line."""
    if isinstance(error, Image.DecompressionBombError):
        most = 2 * Image.MAX_IMAGE_PIXELS
        return f"it has more than the {most / 1e6:.0f} million pixels Pillow opens; make it smaller"
    return one_line(error)


def patiently(call: Callable[[], T]) -> T:
    """`call()`, a few times where the system has an error: networks have hiccups.

    Pillow's own errors are OSErrors without a number; they are of the file and come again.
    """
    for pause in PAUSES:
        try:
            return call()
        except OSError as error:
            if error.errno is None or error.errno in _DEFINITE or error.errno in _HOPELESS:
                raise
        time.sleep(pause)
    return call()
