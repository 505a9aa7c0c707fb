"""Launch parameters of every kernel, in one table keyed by problem class.

The table is `launch_table.json`, which `python -m benchmarks.tune` writes; nothing is tuned while a
step runs. A class is "<kernel>-<tile>-<head dim>-<precision>", where the tile is the power of two
that holds a group, or "long", and the precision "16bit" or "fp32".
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib

import torch

TABLE = pathlib.Path(__file__).parent / "launch_table.json"
HEAD_DIMS = (16, 32, 64)
# Backward tiles above this do not fit the registers of every architecture; groups above it loop.
LARGEST_BACKWARD_TILE = {
    "16bit": {16: 64, 32: 64, 64: 32},
    "fp32": {16: 32, 32: 64, 64: 32},
}
# Programs per multiprocessor below which the images of a batch are spread over more programs.
PROGRAMS_PER_PROCESSOR = 4


@dataclasses.dataclass(frozen=True)
class Launch:
    """Warps and stages of a program, the most images it loops over, and the slots of its tile.

    The tile is that of the class; "long" classes choose the block they loop by.
    """

    warps: int
    stages: int
    images: int
    block: int


@functools.cache
def launch_table() -> dict[str, Launch]:
    """The shipped table, read once."""
    return {name: Launch(**values) for name, values in json.loads(TABLE.read_text()).items()}


def tile_of(group_size: int, largest: int = 64) -> int | None:
    """The tile that holds a group, or None for a loop over blocks of slots."""
    for tile in (16, 32, 64):
        if group_size <= tile <= largest:
            return tile
    return None


def precision_of(dtype: torch.dtype) -> str:
    """ "fp32" or "16bit": what the table tells apart."""
    return "fp32" if dtype == torch.float32 else "16bit"


def class_name(kernel: str, tile: int | None, head_dim: int, dtype: torch.dtype) -> str:
    """Name of a problem class in the table."""
    return f"{kernel}-{tile or 'long'}-{head_dim}-{precision_of(dtype)}"


@functools.cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def images_per_program(
    launch: Launch, programs_per_image: int, batch: int, device: torch.device
) -> int:
    """As many as the table says, but so few that the programs fill the chip."""
    wanted = PROGRAMS_PER_PROCESSOR * num_processors(device)
    return max(1, min(launch.images, batch, programs_per_image * batch // wanted))
