"""Finding image files and opening them as three-channel pictures."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif")
)

ORIENTATION_TAG = 0x0112  # of EXIF


def find_images(root: str | Path) -> np.ndarray:
    """Every image file under a folder, at any depth, in sorted order.

    Hidden files and folders are left out; linked folders are followed, each once.

    Returns:
        bytes array [number of files] of paths relative to `root`. One flat array instead of a list
        of strings, so that loader processes share its memory however many millions of names it
        holds.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        NotADirectoryError: `root` is a file.
    """
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"There is no folder {root}; pass the folder with the images.")
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is a file; pass the folder with the images.")
    names: list[bytes] = []
    seen: set[str] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                names.append(os.fsencode(os.path.relpath(os.path.join(folder, name), root)))
    if not names:
        raise FileNotFoundError(
            f"There is no image in {root}; looked at any depth for"
            f" {', '.join(sorted(IMAGE_SUFFIXES))}."
        )
    return np.array(sorted(names), dtype=bytes)


def open_rgb(file: str | Path | io.BytesIO) -> Image.Image:
    """Open any picture as 8-bit RGB.

    Upright by its EXIF tag, transparency laid on white, 16 bits scaled to 8.

    Raises:
        OSError and others from Pillow: the file is corrupt, truncated or no image.
    """
    with Image.open(file) as image:
        image.load()
        return to_rgb(upright(image))


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


def upright_size(image: Image.Image) -> tuple[tuple[int, int], bool]:
    """(height, width) of a picture once `upright`, and whether that swaps its sides."""
    try:
        turned = image.getexif().get(ORIENTATION_TAG, 1) in (5, 6, 7, 8)
    except Exception:  # a broken EXIF block raises anything
        turned = False
    return (image.size if turned else image.size[::-1]), turned


def upright(image: Image.Image) -> Image.Image:
    """A picture turned as its EXIF tag says."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block raises anything; the pixels are still good
        return image


def open_fitted(file: str | Path | io.BytesIO, size: tuple[int, int]) -> Image.Image:
    """The middle of any picture as 8-bit RGB, scaled to `size` (height, width) in px.

    Raises:
        OSError and others from Pillow: the file is corrupt, truncated or no image.
    """
    return ImageOps.fit(open_rgb(file), size[::-1], Image.Resampling.BICUBIC)
