"""A picture of any kind as 8-bit RGB, upright."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from greenmim.recipe import ImagesConfig

try:
    import pillow_heif
except ImportError:
    pass
else:
    pillow_heif.register_heif_opener()

# Pictures of pixels. Pillow knows more, which hold data, drawings or fonts, or need programs.
_FORMATS = frozenset(
    "AVIF BMP DIB GIF HEIF JPEG JPEG2000 MPO PCX PNG PPM QOI SGI TGA TIFF WEBP".split()
)
IMAGE_SUFFIXES = frozenset(
    suffix for suffix, kind in Image.registered_extensions().items() if kind in _FORMATS
)
MAX_PIXELS = ImagesConfig.max_pixels
_ORIENTATION_TAG = 0x0112  # of EXIF
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # of TIFF
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


@contextlib.contextmanager
def opened(
    file: str | os.PathLike | io.BytesIO, most: int = MAX_PIXELS, advice: str = ""
) -> Iterator[Image.Image]:
    """Open a picture without loading its pixels.

    Args:
        advice: What to do about one of more than `most` pixels; ends its error.

    Raises:
        OSError: more than `most` pixels. Others from Pillow: corrupt, truncated or no image.
    """
    before = Image.MAX_IMAGE_PIXELS
    # Above its own limit Pillow warns of what is refused here, above twice that it refuses.
    Image.MAX_IMAGE_PIXELS = None
    try:
        with Image.open(file) as image:
            if image.width * image.height > most:
                raise Image.DecompressionBombError
            Image.MAX_IMAGE_PIXELS = before and max(before, most)  # of what else is in the file
            yield image
    except Image.DecompressionBombError:
        limit = f"{most / 1e6:g} million" if most >= 1e6 else most
        raise OSError(f"it has more than {limit} pixels{advice}") from None
    finally:
        Image.MAX_IMAGE_PIXELS = before


_chatter: set[bytes] = set()


@contextlib.contextmanager
def named_chatter(name: Callable[[], str]) -> Iterator[None]:
    """Print what C decoders write to stderr inside with a file's name, each text once.

    Args:
        name: Called where there is such text.
    """
    try:
        before = open(os.dup(2), "wb", buffering=0)
    except OSError:  # stderr is closed
        yield
        return
    with before, open(os.memfd_create("chatter"), "r+b", buffering=0) as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before.fileno(), 2)
            if caught.tell():
                caught.seek(0)
                text = caught.read()
                if text not in _chatter:
                    _chatter.add(text)
                    line = " ".join(text.decode(errors="replace").split())
                    with contextlib.suppress(OSError):
                        print(f"{name()}: {line}", file=sys.stderr)


def open_rgb(file: str | Path | io.BytesIO, most: int = MAX_PIXELS) -> Image.Image:
    """Open any picture as 8-bit RGB, upright, transparency laid on white, 16 bits scaled to 8.

    A corrupt, truncated or other file raises OSError, or others from Pillow (see `opened`).
    """
    with opened(file, most) as image:
        image.load()  # some formats hold their EXIF block behind the pixels
        return to_rgb(upright(image, orientation(image)), white_of(image))


def white_of(image: Image.Image) -> int:
    """The value of white in a loaded picture of more than 8 bits; 255 otherwise.

    Negative where 0 is white.

    Raises:
        OSError: its numbers have no defined brightness.
    """
    tags = getattr(image, "tag_v2", {})  # of TIFF alone
    if 2 in np.atleast_1d(tags.get(_SAMPLE_FORMAT, 1)):
        raise OSError("its pixels are signed numbers, of which none is black; store it unsigned")
    if image.mode == "F":
        values = np.asarray(image)
        low, high = values.min(initial=0), values.max(initial=0)
        if not (0 <= low and high <= 1):
            raise OSError(
                f"its pixels are fractions from {low:g} to {high:g}, of which none is white; scale"
                " them to 0 to 1"
            )
        return 1
    if image.mode == "I" and image.format != "PPM" and image.format != "PNG":
        raise OSError("its pixels have 32 bits, of which none is white; store it in 8 or 16")
    if not image.mode.startswith("I"):
        return 255
    bits = np.atleast_1d(tags.get(_BITS_PER_SAMPLE, 16))[0]
    return (2 ** int(bits) - 1) * (-1 if tags.get(_PHOTOMETRIC) == 0 else 1)


def to_rgb(image: Image.Image, white: int = 255) -> Image.Image:
    """Convert a loaded picture, or a part of one, to 8-bit RGB, see `open_rgb`.

    Args:
        white: `white_of` the whole picture.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow's own conversion clips 16-bit values at 255, which turns such pictures white.
        values = np.asarray(image)
        grey = np.clip(values * np.float32(255 / abs(white)), 0, 255).round().astype(np.uint8)
        if white < 0:
            grey = 255 - grey
        clear = image.info.get("transparency")
        if isinstance(clear, int):
            grey[values == clear] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        opaque = image if image.mode == "RGBA" else image.convert("RGBA")
        on_white = Image.new("RGB", opaque.size, (255, 255, 255))
        on_white.paste(opaque, mask=opaque)
        return on_white
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
