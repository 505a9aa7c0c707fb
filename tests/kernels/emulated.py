"""The CUDA kernels as a program (tests/emulator): build it, feed it, collect what it wrote.

Built by a C++ compiler the program runs the kernels on the emulator, by nvcc on a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
import shutil
import struct
import subprocess
import tempfile

import numpy as np
import torch
from conv_cases import ConvInputs
from filelock import FileLock
from torch import Tensor

import greenmim_kernels as gk
from greenmim_kernels.ops import _pad_gradient
from greenmim_kernels.partition import GroupPartition
from greenmim_kernels.testing import Inputs

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILDS = ROOT / "build" / "tests"
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FLAGS = {  # compiling with optimisation for both sanitizers of the second takes ten times as long
    "plain": ["-O2"],
    "address": ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-fsanitize=thread"],
}
# The shared memory that a block may ask for on sm_90, on sm_80, and on sm_86, where it is least.
LARGE, MIDDLE, SMALL = 232448, 166912, 101376


@functools.cache
def build(
    program: str, kind: str = "plain", *defines: str, root: pathlib.Path = ROOT
) -> pathlib.Path:
    """Compile a program of tests/emulator for the emulator; `kind` names the sanitizers.

    What was compiled from the same sources before is taken, also of another process or run.
    """
    emulator = root / "tests" / "emulator"
    command = [os.environ.get("CXX", "g++"), "-std=c++20", *FLAGS[kind], "-fno-strict-aliasing"]
    command += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-DGREENMIM_EMULATE"]
    command += [f"-D{define}" for define in defines]
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout
    contents = hashlib.sha256(version + repr(command).encode())
    for file in sorted([*(root / "csrc" / "cuda").iterdir(), *emulator.iterdir()]):
        contents.update(file.name.encode() + file.read_bytes())
    name = "-".join([program, kind, root.name, *(define.replace("=", "") for define in defines)])
    folder = BUILDS / name  # of this program alone: older builds of it go
    folder.mkdir(parents=True, exist_ok=True)
    binary = folder / contents.hexdigest()
    with FileLock(f"{folder}.lock"):
        if not binary.exists():
            for old in folder.iterdir():
                old.unlink()
            beside = f"{binary}.new"
            command += [f"-I{emulator}", "-x", "c++", str(emulator / program), "-o", beside]
            subprocess.run(command, check=True, timeout=600)
            os.replace(beside, binary)
    return binary


def toolkit(program: str) -> str | None:
    """A program of the CUDA toolkit, of the one that setup.py takes where it is there; or None."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))
    folders = [str(pathlib.Path(home) / "bin") for home in homes if home]
    folders += [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which(program, path=os.pathsep.join(folders))


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="greenmim_programs_")


@functools.cache
def build_for_gpu(program: str, *defines: str) -> pathlib.Path:
    """Compile a program of tests/emulator with nvcc for the GPU of this machine.

    GREENMIM_PROGRAMS names a folder that processes share, for as long as the sources stay.
    """
    folder = pathlib.Path(os.environ.get("GREENMIM_PROGRAMS") or _own_folder().name)
    defined = (define.replace("=", "") for define in defines)
    binary = folder / "-".join([program, "gpu", *defined])
    if binary.exists():
        return binary
    nvcc = toolkit("nvcc")
    if nvcc is None:
        raise RuntimeError("no nvcc was found, so put it on PATH or set CUDA_HOME")
    command = [nvcc, "-std=c++20", "-O3", "-lineinfo", "--expt-relaxed-constexpr", "-arch=native"]
    command += [f"-D{define}" for define in defines]
    command += [str(ROOT / "tests" / "emulator" / program), "-o", f"{binary}.{os.getpid()}"]
    subprocess.run(command, check=True, timeout=600)
    pathlib.Path(command[-1]).replace(binary)
    return binary


def run_binary(
    command: list[str | pathlib.Path], data: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    environment = {
        **os.environ,
        # Fibers leave their stacks for good; that is no leak.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0",
    }
    return subprocess.run(
        list(map(str, command)), input=data, capture_output=True, env=environment, timeout=600
    )


@dataclasses.dataclass
class Launch:
    """How a problem is run; as it stands, by the emulator."""

    thread_order: int = 0
    processors: int = 1
    shared_bytes: int = LARGE
    gathered: bool = False
    apart: bool = False  # q, k and v head by head, each on its own
    need_qkv: bool = True
    need_table: bool = True
    scale: float | None = None  # head_dim ** -0.5

    @classmethod
    def of_gpu(cls) -> Launch:
        """As a launch is made for the GPU of this machine."""
        gpu = torch.cuda.get_device_properties(0)
        return cls(
            processors=gpu.multi_processor_count,
            shared_bytes=gpu.shared_memory_per_block_optin,
        )


def _bytes(tensor: Tensor | None) -> bytes:
    if tensor is None:
        return b""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def run(
    inputs: Inputs, launch: Launch | None = None, binary: pathlib.Path | None = None
) -> dict[str, Tensor]:
    """Forward and backward: {"out", "lse", "grad_qkv", "grad_table"} as the kernels wrote them.

    Raises:
        Caught: the program stopped; the message is what it or a sanitizer wrote.
    """
    launch = launch or Launch()
    done = run_binary([binary or build("attention.cu")], encode(inputs, launch))
    if done.returncode != 0:
        raise Caught(done.stderr.decode(errors="replace")[:4000])
    return decode(inputs, launch, done.stdout)


class Caught(Exception):
    """The emulator or a sanitizer stopped the program."""


def copy_rows(rows: Tensor, part: GroupPartition, what: str, order: int = 0) -> Tensor:
    """ "gather" [B, N, C] -> [B, G * S, C], or "scatter" back, as the copy kernels do it."""
    slots = part.num_groups * part.group_size
    header = struct.pack(
        "=19qd", order, rows.element_size(), rows.shape[2], len(rows), part.num_tokens,
        part.token_index.shape[0], part.num_groups, part.group_size, *[0] * 11, 0.0,
    )  # fmt: skip
    data = header + _bytes(rows) + _bytes(part.token_index)
    done = run_binary([build("attention.cu"), what], data)
    if done.returncode != 0:
        raise Caught(done.stderr.decode(errors="replace")[:4000])
    raw = torch.frombuffer(bytearray(done.stdout), dtype=torch.uint8)
    count = slots if what == "gather" else part.num_tokens
    return raw.view(rows.dtype).view(len(rows), count, rows.shape[2])


def convolve(
    inputs: ConvInputs,
    order: int = 0,
    processors: int = 1,
    needs: tuple[bool, bool, bool] = (True, True, True),
    binary: pathlib.Path | None = None,
) -> dict[str, Tensor]:
    """The convolution of visible tokens: as `run_conv`, with the gradients asked for.

    Raises:
        Caught: the program stopped; the message is what it or a sanitizer wrote.
    """
    data = encode_conv(inputs, order, processors, needs)
    done = run_binary([binary or build("conv.cu")], data)
    if done.returncode != 0:
        raise Caught(done.stderr.decode(errors="replace")[:4000])
    return decode_conv(inputs, done.stdout, needs)


def encode_conv(
    inputs: ConvInputs, order: int, processors: int, needs: tuple[bool, bool, bool] = (True,) * 3
) -> bytes:
    x, bias = inputs.x, inputs.bias
    header = struct.pack(
        "=11q", order, ELEMENTS[x.dtype], *x.shape, len(inputs.neighbours), bias is not None,
        *needs, processors,
    )  # fmt: skip
    arrays = (x, inputs.grad_out, inputs.weight, bias, inputs.neighbours)
    return header + b"".join(map(_bytes, arrays))


def decode_conv(
    inputs: ConvInputs, data: bytes, needs: tuple[bool, bool, bool] = (True,) * 3
) -> dict[str, Tensor]:
    x, weight = inputs.x, inputs.weight
    results, offset = {}, 0
    like = {"out": x, "grad_x": x, "grad_weight": weight, "grad_bias": weight[:, 0]}
    for (name, tensor), written in zip(like.items(), (True, *needs), strict=True):
        if written:
            count = tensor.numel() * tensor.itemsize
            raw = bytearray(data[offset : offset + count])
            results[name] = torch.frombuffer(raw, dtype=tensor.dtype).view(tensor.shape)
            offset += count
    if offset != len(data):
        raise RuntimeError(f"the program wrote {len(data)} bytes where {offset} were expected")
    return results


def plan(
    dtype: torch.dtype,
    head_dim: int,
    slots: int,
    window: int,
    shared_bytes: int = LARGE,
    per_image: bool = False,
    batch: int = 256,
    rows: int = 768,
    heads: int | None = None,
    processors: int = 132,
) -> list[dict[str, int]]:
    """How a launch would be made, forward and backward: for Swin-B's first stage, if not told.

    A processor holds two blocks, or one where shared memory does not hold two.
    """
    header = struct.pack(
        "=19qd", 0, ELEMENTS[dtype], head_dim, batch, rows, batch if per_image else 1,
        -(-rows // slots), slots, heads or 128 // head_dim, window**2, (2 * window - 1) ** 2,
        *[0] * 6, processors, shared_bytes, 1.0,
    )  # fmt: skip
    done = run_binary([build("attention.cu"), "plan"], header)
    names = ("fits", "is_long", "over_heads", "strips", "share", "block_heads", "shared_bytes")
    lines = done.stdout.decode().splitlines()
    return [dict(zip(names, map(int, line.split()), strict=True)) for line in lines]


def images_per_block(batch: int, blocks: int, places: int) -> int:
    """Where a run of images needs `blocks` blocks, and `places` blocks run at the same time."""
    header = struct.pack("=19qd", 0, 0, 0, batch, 0, 0, blocks, *[0] * 10, places, 0, 1.0)
    return int(run_binary([build("attention.cu"), "images"], header).stdout)


def _rows(inputs: Inputs, launch: Launch) -> int:
    part = inputs.part
    return part.num_groups * part.group_size if launch.gathered else part.num_tokens


def encode(inputs: Inputs, launch: Launch) -> bytes:
    part, qkv, grad_out = inputs.part, inputs.qkv, inputs.grad_out
    if launch.gathered:
        with gk.use_backend("reference"):
            padding = (part.window_id < 0).expand(len(qkv), -1, -1)[..., None]
            # Padding is never read: it holds NaN.
            qkv, grad_out = (
                gk.group_gather(x, part).masked_fill(padding, torch.nan) for x in (qkv, grad_out)
            )
    head_dim = qkv.shape[-1] // (3 * inputs.num_heads)
    header = struct.pack(
        "=19qd", launch.thread_order, ELEMENTS[qkv.dtype], head_dim, len(qkv),
        _rows(inputs, launch), part.token_index.shape[0], part.num_groups, part.group_size,
        inputs.num_heads, part.window_slots, 0 if inputs.table is None else len(inputs.table),
        inputs.table is not None, inputs.pad_value is not None, launch.gathered, launch.apart,
        launch.need_qkv,
        launch.need_table and inputs.table is not None, launch.processors,
        launch.shared_bytes, head_dim**-0.5 if launch.scale is None else launch.scale,
    )  # fmt: skip
    if launch.apart:
        qkv = qkv.unflatten(-1, (3, inputs.num_heads, -1)).permute(2, 0, 3, 1, 4)
    token_index = None if launch.gathered else part.token_index
    arrays = (qkv, grad_out, inputs.table, inputs.pad_value, token_index, *part.tensors[1:])
    return header + b"".join(map(_bytes, arrays))


def decode(inputs: Inputs, launch: Launch, data: bytes) -> dict[str, Tensor]:
    batch, rows, heads = len(inputs.qkv), _rows(inputs, launch), inputs.num_heads
    channels = inputs.qkv.shape[-1] // 3
    dtype = inputs.qkv.dtype
    shapes = {"out": ((batch, rows, channels), dtype), "lse": ((batch, heads, rows), torch.float32)}
    if launch.need_qkv:
        shapes["grad_qkv"] = ((batch, rows, 3 * channels), dtype)
    if launch.need_table and inputs.table is not None:
        shapes["grad_table"] = (tuple(inputs.table.shape), torch.float32)
    if launch.need_qkv and inputs.pad_value is not None:
        shapes["grad_pad"] = ((2 * channels // heads, heads), torch.float32)
    results, offset = {}, 0
    for name, (shape, element) in shapes.items():
        count = int(np.prod(shape)) * element.itemsize
        raw = torch.frombuffer(bytearray(data[offset : offset + count]), dtype=torch.uint8)
        results[name] = raw.view(element).view(shape)
        offset += count
    if offset != len(data):
        raise RuntimeError(f"the emulator wrote {len(data)} bytes where {offset} were expected")
    if "grad_pad" in results:
        results["grad_pad"] = _pad_gradient(results["grad_pad"], inputs.pad_value)
    if launch.apart and launch.need_qkv:
        apart = results["grad_qkv"].reshape(3, batch, heads, rows, channels // heads)
        results["grad_qkv"] = apart.permute(1, 3, 0, 2, 4).flatten(2)
    return results
