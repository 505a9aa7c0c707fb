"""Pictures of what a model makes of hidden patches: original, masked, reconstruction."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from greenmim.data.dataset import normalise
from greenmim.data.images import find_images, open_fitted
from greenmim.guards import UserError, first_line
from greenmim.masking import random_visible
from greenmim.pictures import shown
from greenmim.recipe import IMAGENET_MEAN, IMAGENET_STD
from greenmim.tools.loading import load_model

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")


def reconstruct(
    checkpoint: str | Path,
    images: Sequence[str | Path],
    output: str | Path,
    *,
    model: str | None = None,
    seed: int = 0,
    mask_ratio: float | None = None,
    paste_visible: bool = True,
    limit: int = 12,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> Path:
    """Draw original, masked and reconstructed images.

    Args:
        checkpoint: A run's checkpoint, or any greenmim or official one with a decoder, if the model
            is named.
        images: Files, or folders of which the first `limit` images are taken.
        output: The picture to write; the suffix (.png, .jpg, .webp, .pdf, .svg) says how.
        model: Name of the model, for a checkpoint that does not say.
        seed: Seed of the masks, one per image.
        mask_ratio: Share of hidden units; null takes the run's, or 0.75.
        paste_visible: Show visible patches as they are, and only hidden ones as predicted.
        limit: Greatest number of images.
        device: Where to run.

    Returns:
        The path written.

    Raises:
        UserError: a file is missing or unreadable, or the checkpoint is of another model.
    """
    output = Path(output)
    if output.suffix.lower() not in PICTURE_SUFFIXES:
        raise UserError(f"--output {output} has to end in one of {', '.join(PICTURE_SUFFIXES)}.")
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise UserError(f"--output {output} cannot be written: there is no folder {output.parent}.")
    if limit < 1:
        raise UserError(f"--limit is {limit}; it has to be at least 1.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA GPU here.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    files = _image_files(images)[:limit]
    network, run = load_model(checkpoint, model)
    network = network.to(device).eval()
    data = run.get("data", {})
    mean, std = list(data.get("mean", IMAGENET_MEAN)), list(data.get("std", IMAGENET_STD))
    if mask_ratio is None:
        mask_ratio = run.get("mask", {}).get("ratio", 0.75)

    size = network.config.image_hw
    pictures = torch.stack([normalise(_read(file, size), mean, std) for file in files])
    rng = np.random.default_rng(seed)
    try:
        visible = random_visible(rng, network.config.num_units, mask_ratio, batch=len(files))
    except ValueError as error:
        raise UserError(f"--mask-ratio: {error}.") from error
    columns = shown(network, pictures.to(device), visible, mean, std, paste_visible)
    titles = ("original", f"masked ({100 * mask_ratio:.0f} % hidden)", "reconstruction")
    _draw(columns, titles, [file.stem for file in files], output)
    return output


def _image_files(images: Sequence[str | Path]) -> list[Path]:
    files = []
    for given in map(Path, images):
        if given.is_dir():
            files += [given / name for name in find_images(given)]
        elif given.is_file():
            files.append(given)
        else:
            raise UserError(f"There is no image {given}.")
    return files


def _read(file: Path, size: tuple[int, int]) -> Image.Image:
    try:
        return open_fitted(file, size)
    except Exception as error:  # decoders raise anything on a broken file
        raise UserError(f"{file} cannot be read as an image: {first_line(error)}") from error


def _draw(
    columns: list[torch.Tensor], titles: Sequence[str], names: Sequence[str], output: Path
) -> None:
    """Rows of images under titled columns, in blocks that keep the page near square."""
    from matplotlib.figure import Figure

    count, (height, width) = len(names), columns[0].shape[-2:]
    blocks = 1 if count <= 4 else 2 if count <= 16 else 3
    rows = -(-count // blocks)
    cell_width, cell_height, gap, top, between = 1.7, 1.7 * height / width, 0.05, 0.32, 0.35
    page_width = blocks * 3 * (cell_width + gap) + (blocks - 1) * between + 2 * gap
    page_height = rows * (cell_height + gap) + top + gap
    figure = Figure(figsize=(page_width, page_height), dpi=max(100, min(width / cell_width, 200)))
    for index in range(count):
        block, row = divmod(index, rows)
        for column in range(3):
            left = gap + block * (3 * (cell_width + gap) + between) + column * (cell_width + gap)
            bottom = page_height - top - (row + 1) * (cell_height + gap) + gap
            axes = figure.add_axes(
                (
                    left / page_width,
                    bottom / page_height,
                    cell_width / page_width,
                    cell_height / page_height,
                )
            )
            axes.imshow(columns[column][index].permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set_axis_off()
            if row == 0:
                axes.set_title(titles[column], fontsize=10, pad=5)
    temporary = output.with_name(f".{output.stem}.{os.getpid()}{output.suffix}")
    try:
        figure.savefig(temporary)
        os.replace(temporary, output)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}.") from error
    finally:
        temporary.unlink(missing_ok=True)
