"""Pictures of what a model makes of hidden patches: original, masked, reconstruction."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from greenmim.checkpoint import write_atomic
from greenmim.data.dataset import normalise
from greenmim.data.decode import named_chatter, open_fitted
from greenmim.data.sources import PREFIXES, find_source
from greenmim.guards import UserError, one_line
from greenmim.launch import World
from greenmim.masking import draw_visible
from greenmim.messages import drawable
from greenmim.pictures import shown
from greenmim.recipe import IMAGENET_MEAN, IMAGENET_STD, DataConfig
from greenmim.tools.loading import check_output, load_model, not_written
from greenmim.training.startup import choose_device

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
    overwrite: bool = False,
) -> Path:
    """Draw original, masked and reconstructed images.

    Args:
        checkpoint: A run's checkpoint, or any greenmim or official one with a decoder, if the model
            is named.
        images: Files; or folders, tars, shards and datasets as in `DataConfig.root`, whose first
            readable images are drawn.
        output: The picture to write; the suffix (.png, .jpg, .webp, .pdf, .svg) says how.
        model: Name of the model, for a checkpoint that does not say.
        seed: Seed of the masks, one per image.
        mask_ratio: Share of hidden units; null takes the run's, or 0.75.
        paste_visible: Keep the pixels of visible units; only hidden ones are as predicted.
        limit: Greatest number of images.
        device: Where to run.
        overwrite: Replace an output that is there already.

    Returns:
        The path written.

    Raises:
        UserError: a file is missing or unreadable, or the checkpoint is of another model.
    """
    output = Path(output)
    check_output(output, PICTURE_SUFFIXES, overwrite, any_case=True)
    if limit < 1:
        raise UserError(f"--limit is {limit}; it has to be at least 1.")
    chosen = choose_device(device, World())
    network, run = load_model(checkpoint, model)
    size = network.config.image_hw
    found = _pictures(images, size)
    named = list(itertools.islice(found, limit))
    with contextlib.suppress(UserError):  # what is not drawn need not be readable
        if next(found, None):
            print(f"only the first {limit} are drawn; --limit draws more", file=sys.stderr)
    if not named:
        raise UserError("--images: none of them can be read; pass image files or their folder.")
    network = network.to(chosen).eval()
    data = run.get("data", {})
    mean, std = list(data.get("mean", IMAGENET_MEAN)), list(data.get("std", IMAGENET_STD))
    if mask_ratio is None:
        mask_ratio = run.get("mask", {}).get("ratio", 0.75)

    pictures = torch.stack([normalise(picture, mean, std) for _, picture in named])
    rng = np.random.default_rng(seed)
    try:
        kind = run.get("mask", {}).get("kind", "random")
        visible = draw_visible(rng, network.config.unit_grid, mask_ratio, len(named), kind)
    except ValueError as error:
        raise UserError(f"--mask-ratio: {error}.") from error
    columns = shown(network, pictures.to(chosen), visible, mean, std, paste_visible)
    units = network.config.num_units
    hidden = f"{units - int(visible[0].sum())} of {units} units hidden"
    _draw(columns, ("original", hidden, "reconstruction"), [name for name, _ in named], output)
    return output


def _pictures(
    images: Sequence[str | Path], size: tuple[int, int]
) -> Iterator[tuple[str, Image.Image]]:
    """Names and pictures, of `size`; a file that was named itself has to be readable."""
    for given in map(str, images):
        if os.path.isfile(given) and not given.lower().endswith(".tar"):
            yield os.path.basename(given), _read(functools.partial(os.fspath, given), given, size)
            continue
        if not os.path.exists(given) and not given.lower().startswith(PREFIXES):
            raise UserError(f"There is no image {given}.")
        try:
            source = find_source(DataConfig(root=given))
        except UserError as error:
            raise UserError(str(error).replace("--data.root", "--images")) from error
        for index in range(len(source)):
            name = source.path(index)
            try:
                picture = _read(functools.partial(source.open, index), name, size)
            except UserError as error:
                print(error, file=sys.stderr)
            else:
                yield os.path.basename(name), picture


def _read(open_file: Callable, name: str, size: tuple[int, int]) -> Image.Image:
    try:
        file = open_file()
        with named_chatter(lambda: name):
            return open_fitted(file, size)
    except Exception as error:  # decoders raise anything on a broken file
        raise UserError(f"{name} cannot be read as an image: {one_line(error)}") from error


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
            if column == 0:
                box = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1}
                how: dict[str, Any] = {"fontsize": 6, "bbox": box, "parse_math": False}
                name = drawable(names[index], 28)
                axes.text(0.02, 0.02, name, transform=axes.transAxes, **how)
    kind = output.suffix.lower().removeprefix(".")
    try:
        write_atomic(lambda beside: figure.savefig(beside, format=kind), output)
    except OSError as error:
        raise not_written(output, error) from error
