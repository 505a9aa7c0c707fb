"""Launch parameters of the attention kernels, in one table keyed by problem class.

`python -m benchmarks.tune` writes the table, `launch_table.json`; nothing is tuned during a step. A
class is "<kernel>-<tile>-<head dim>-<precision>". The tile is the least of 16, 32 and 64 that holds
a group, or "long". The precision is "16bit" or "fp32". The suffix "@80" is for devices without
wgmma or tcgen05: those before sm_90, and sm_120 and newer. Their products take smaller tiles and
keep both operands in registers.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import re

import torch

TABLE = pathlib.Path(__file__).parent / "launch_table.json"
HEAD_DIMS = (16, 32, 64)
# Backward tiles above this do not fit the registers of every architecture; groups above it loop.
LARGEST_BACKWARD_TILE = {
    "16bit": {16: 64, 32: 64, 64: 32},
    "fp32": {16: 32, 32: 64, 64: 32},
}
# Limits of a multiprocessor: registers and programs, and by `_limits` warps and shared memory.
REGISTERS, PROGRAMS = 65_536, 32
# The cost of a program's setup and table gradient, measured in images.
SETUP_IMAGES = 3


@dataclasses.dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    Attributes:
        warps, stages: of a program, Triton's num_warps and num_stages.
        resident: programs that a multiprocessor holds at once.
        block: slots that a program takes at once, the class's tile; tuned where that is "long".
    """

    warps: int
    stages: int
    resident: int
    block: int


@functools.cache
def launch_table(architecture: int) -> dict[str, Launch]:
    """The shipped launches for an architecture, read once."""
    stored = {name: Launch(**values) for name, values in json.loads(TABLE.read_text()).items()}
    table = {name: value for name, value in stored.items() if "@" not in name}
    return {name: stored.get(_stored_name(name, architecture), table[name]) for name in table}


def _stored_name(name: str, architecture: int) -> str:
    return name if has_wide_products(architecture) else f"{name}@80"


def has_wide_products(architecture: int) -> bool:
    """Whether tensor cores take operands from shared memory, by wgmma (sm_90) or tcgen05."""
    return 90 <= architecture < 120


def save(table: dict[str, Launch], architecture: int) -> None:
    """Replace launches for this kind of device, with wide products or not; the other's stay."""
    stored = json.loads(TABLE.read_text())
    for name, value in table.items():
        if value != launch_table(architecture)[name]:
            if has_wide_products(architecture):  # other devices used this entry too, and keep it
                stored.setdefault(_stored_name(name, 80), stored[name])
            stored[_stored_name(name, architecture)] = dataclasses.asdict(value)
    write_json(TABLE, dict(sorted(stored.items(), key=lambda item: item[0].partition("@"))))


def write_json(path: pathlib.Path, content: dict) -> None:
    """Write a file, whole or not at all; objects that hold no others take a line each."""
    text = json.dumps(content, indent=1)
    text = re.sub(r"\{[^{}]*\}", lambda found: " ".join(found[0].split()), text)
    beside = path.with_suffix(f".{os.getpid()}.tmp")  # another process may write it too
    with beside.open("w") as out:
        out.write(text + "\n")
        out.flush()
        os.fsync(out.fileno())
    beside.replace(path)


def tile_of(group_size: int, largest: int = 64) -> int | None:
    """The tile that holds a group, or None for a loop over blocks of slots."""
    for tile in (16, 32, 64):
        if group_size <= tile <= largest:
            return tile
    return None


def precision_of(dtype: torch.dtype) -> str:
    """The table's word for a dtype, "fp32" or "16bit"."""
    return "fp32" if dtype == torch.float32 else "16bit"


def class_name(kernel: str, tile: int | None, head_dim: int, dtype: torch.dtype) -> str:
    """Name of a problem class in the table."""
    return f"{kernel}-{tile or 'long'}-{head_dim}-{precision_of(dtype)}"


@functools.cache
def architecture_of(device: torch.device) -> int:
    """80, 90 and so on; 90 for the interpreter."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def resident(found: dict, warps: int, architecture: int) -> int:
    """Programs that a multiprocessor holds, from a kernel's "registers" and "shared_bytes"."""
    # registers are allocated in units of eight per thread
    per_warp = 32 * 8 * -(-found["registers"] // 8)
    most_warps, shared = _limits(architecture)
    return min(
        REGISTERS // per_warp // 4 * 4 // warps,  # split evenly over four schedulers
        most_warps // warps,
        PROGRAMS,
        shared // (found["shared_bytes"] + 1024),
    )


def _limits(architecture: int) -> tuple[int, int]:
    """Warps and bytes of shared memory of a multiprocessor."""
    if architecture in (86, 89) or architecture >= 120:
        return 48, 102_400
    return 64, 233_472 if architecture >= 90 else 167_936


def expected_filled(groups: int, tokens: int, slots: int) -> int:
    """How many of an image's groups are expected to hold tokens, as in attention_launch.cuh.

    For random masks that is most often the least number possible; from 12 on, one more.
    """
    least = -(-tokens // slots)
    return min(groups, least + (least >= 12))


def pairs_of(blocks: int) -> tuple[int, int]:
    """(programs for all pairs of a group's blocks, those with work): windows reach few blocks."""
    return blocks**2, min(blocks**2, 3 * blocks)


@functools.cache
def images_per_program(batch: int, programs: int, places: int) -> int:
    """The number of images per program that minimizes waves x (setup + images).

    programs: how many each run of images needs. places: how many the GPU holds at once.
    """

    def cost(images: int) -> int:
        waves = -(-programs * -(-batch // images) // places)
        return waves * (SETUP_IMAGES + images)

    return min(range(batch, 0, -1), key=cost)
