"""Backends: their names, what each can do, whether it works here and why not, and the choice.

The choice is made in Python at every call of a public function (while tracing, under
``torch.compile``: a compiled function keeps the backend it was traced with).
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import dataclasses
import functools
import importlib.util
import os
import re
from collections.abc import Iterator
from operator import index

import torch

from . import automatic
from ._libraries import library_file

ENVIRONMENT_VARIABLE = "GREENMIM_BACKEND"
OPERATORS = (
    "group_gather",
    "group_scatter",
    "block_diagonal_attention",
    "group_window_attention",
    "sparse_depthwise_conv",
)

NO_CUDA = "this torch was built without CUDA"

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "greenmim_backend", default=None
)


@dataclasses.dataclass(frozen=True)
class Backend:
    """What a backend can do. ``None`` stands for "any"."""

    device: str | None
    dtypes: tuple[torch.dtype, ...] | None = None
    head_dims: range | None = None


BACKENDS = {
    "reference": Backend(device=None),
    "cpp": Backend(
        device="cpu",
        dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    ),
    "cuda": Backend(
        device="cuda",
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        head_dims=range(4, 65, 4),
    ),
    "triton": Backend(
        device="cuda",
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        head_dims=range(2, 65, 2),
    ),
}
# What "auto" tries on a device, best first.
PREFERENCE = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}


@functools.cache
def load_library(name: str) -> str | None:
    """Load the compiled module `_C` or `_C_cuda`; None, or the reason why it cannot be used."""
    file = library_file(name)
    if name == "_C_cuda" and torch.version.cuda is None:
        return NO_CUDA
    if file is None:
        return f"greenmim_kernels.{name} was not built; the build log (pip install -v) says why"
    try:
        torch.ops.load_library(str(file))
    except OSError as error:
        return f"greenmim_kernels.{name} does not load: {error.__cause__ or error}"
    return None


@functools.cache
def cpu_capability() -> str:
    """The instruction set that the cpp backend uses here: "default", "avx2" or "avx512".

    The best one the processor has, or the one named in GREENMIM_CPU_CAPABILITY.

    Raises:
        RuntimeError: the cpp backend cannot be used; the message gives the reason.
    """
    if reason := load_library("_C"):
        raise RuntimeError(reason)
    library = ctypes.CDLL(str(library_file("_C")))
    for function in (library.greenmim_cpu_capability, library.greenmim_cpu_capability_problem):
        function.restype = ctypes.c_char_p
    name = library.greenmim_cpu_capability()
    if name is None:
        raise RuntimeError(library.greenmim_cpu_capability_problem().decode())
    return name.decode()


def available_backends() -> dict[str, str | None]:
    """What can be used on this machine.

    Returns:
        Every backend by name, with None if it can be used here, else the reason why not.
    """
    return {name: _why_unusable(name) for name in BACKENDS}


def _why_unusable(name: str, device: torch.device | None = None) -> str | None:
    """None, or why a backend cannot be used on this GPU (None: the current one)."""
    if name == "cpp":
        try:
            cpu_capability()
        except RuntimeError as error:
            return str(error)
    if name == "cuda":
        if torch.version.cuda is None:
            return NO_CUDA
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        return load_library("_C_cuda") or _not_built_for(
            cuda_architectures(), torch.cuda.get_device_capability(device)
        )
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if not triton_interprets() and (
            torch.version.cuda is None or not torch.cuda.is_available()
        ):
            return "torch sees no CUDA device (TRITON_INTERPRET=1 runs it on the CPU, slowly)"
        if not triton_interprets() and torch.cuda.get_device_capability(device) < (8, 0):
            return "its kernels need a GPU of compute capability 8.0 or higher"
    return None


@functools.cache
def cuda_architectures() -> tuple[str, ...]:
    """What _C_cuda was compiled for, such as ("8.0", "9.0", "12.0+PTX")."""
    library = ctypes.CDLL(str(library_file("_C_cuda")))
    library.greenmim_cuda_architectures.restype = ctypes.c_char_p
    names = library.greenmim_cuda_architectures().decode()
    return tuple(names.replace(" ", ";").strip(";").split(";"))


def _not_built_for(architectures: tuple[str, ...], device: tuple[int, int]) -> str | None:
    """None if the module runs on a device of this compute capability, else the reason.

    Machine code runs on its own major version, from its minor version up; PTX on anything newer.
    What ends in "a" runs on its own version alone, in "f" on its major version alone.
    """
    for name in architectures:
        found = re.match(r"(\d+)\.(\d+)([af]?)(\+PTX)?$", name)
        if found is None:
            return None  # a named architecture, such as "Hopper": left to the driver
        built = (int(found[1]), int(found[2]))
        if built == device:
            return None
        is_same_major, is_for_newer = built[0] == device[0], found[4] and not found[3]
        if found[3] != "a" and built <= device and (is_same_major or is_for_newer):
            return None
    return (
        f"this GPU has compute capability {device[0]}.{device[1]} and the module was built for"
        f" {', '.join(architectures)}; build with TORCH_CUDA_ARCH_LIST={device[0]}.{device[1]}"
    )


def triton_interprets() -> bool:
    """Whether Triton's interpreter runs the kernels on CPU tensors, for checking, not for speed."""
    # The values that Triton itself takes as true.
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "yes", "true", "on")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use one backend for all operators called in the ``with`` block (in this thread or task).

    Args:
        name: "auto", "reference", "cpp", "cuda" or "triton". A forced backend never falls back:
            an operator it cannot run raises ValueError. "auto" lifts an outer choice, including
            that of the environment variable GREENMIM_BACKEND.

    Raises:
        ValueError: unknown name.
        RuntimeError: the backend cannot be used here; the message gives the reason.
    """
    _require_usable(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def _require_usable(name: str, origin: str = "") -> None:
    if name == "auto":
        return
    if name not in BACKENDS:
        raise ValueError(
            f"unknown backend {name!r}{origin}; choose one of auto, {', '.join(BACKENDS)}"
        )
    if reason := _why_unusable(name):
        raise RuntimeError(f"the {name} backend{origin} cannot be used here: {reason}")


def backend_in_force() -> str:
    """The name in force: the innermost ``use_backend``, else GREENMIM_BACKEND, else "auto".

    Raises:
        ValueError: the environment names an unknown backend.
        RuntimeError: the backend named in the environment cannot be used here.
    """
    name = _forced.get()
    if name is None:
        name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
        _require_usable(name, f" (from {ENVIRONMENT_VARIABLE})")
    return name


# Dynamo keeps the answers as constants of the trace and does not look inside.
@torch.compiler.assume_constant_result
def is_forced() -> bool:
    """Whether a name other than "auto" is in force."""
    return backend_in_force() != "auto"


@torch.compiler.assume_constant_result
def candidates(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """The backends to try on tensors of this device and dtype, best first; one if forced.

    Raises:
        ValueError: a forced backend cannot do it, or the environment names an unknown backend.
        RuntimeError: a forced backend cannot be used here, or not on this device.
    """
    name = backend_in_force()
    if name == "auto":
        return tuple(
            name
            for name in PREFERENCE.get(device.type, ("reference",))
            if _why_unsupported(name, device.type, dtype) is None
            and _why_unusable(name, device) is None
        )
    if reason := _why_unsupported(name, device.type, dtype):
        raise ValueError(f'{reason}; use another backend or "auto"')
    # When it was forced the current GPU was checked; these tensors may be on another.
    if device.type == "cuda" and (reason := _why_unusable(name, device)):
        raise RuntimeError(f"the {name} backend cannot be used on {device}: {reason}")
    return (name,)


def choose_backend(
    operator: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int | None = None,
    group_size: int | None = None,
    table_rows: int | None = None,
) -> str:
    """The backend that runs `operator`; the last three arguments matter to attention only.

    Where "auto" could take either backend of a GPU, the table of `automatic` decides.

    Raises:
        ValueError: a forced backend cannot do it, or the environment names an unknown backend.
        RuntimeError: a forced backend cannot be used here, or not on this device.
    """
    names = candidates(device, dtype)
    if len(names) > 1 and device.type == "cuda":
        first = automatic.choice(operator, dtype, head_dim, group_size).backend
        names = (first, *names) if first in names else names
    for name in names:
        reason = _why_sizes_unsupported(name, device, dtype, head_dim, group_size, table_rows)
        if reason is None:
            return name
    raise ValueError(f'{reason}; use another backend or "auto"')


def automatic_backend(operator: str, device: str, dtype: torch.dtype) -> str:
    """What "auto" takes on this machine for Swin's sizes."""
    with use_backend("auto"):
        return choose_backend(operator, torch.device(device), dtype)


def _why_unsupported(name: str, device: str, dtype: torch.dtype) -> str | None:
    """None if the backend takes tensors of this device and dtype, else the reason."""
    backend = BACKENDS[name]
    interpreted = name == "triton" and triton_interprets() and device == "cpu"
    if backend.device not in (None, device) and not interpreted:
        return f"the {name} backend runs on {backend.device} tensors, these are on {device}"
    if backend.dtypes is not None and dtype not in backend.dtypes:
        known = ", ".join(str(d).removeprefix("torch.") for d in backend.dtypes)
        return f"the {name} backend computes in {known}, not {str(dtype).removeprefix('torch.')}"
    return None


def _why_sizes_unsupported(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int | None,
    group_size: int | None,
    table_rows: int | None,
) -> str | None:
    """None if the backend takes attention of these sizes, else the reason."""
    dims = BACKENDS[name].head_dims
    if head_dim is None or dims is None:
        return None
    # Sizes that may be symbolic while tracing become constants of the trace.
    head_dim = index(head_dim)
    if head_dim not in dims:
        return (
            f"the {name} backend takes head dims that are multiples of {dims.step} up to"
            f" {dims[-1]}, not {head_dim}"
        )
    if name != "cuda":
        return None
    slots, rows = index(group_size or 0), index(table_rows or 0)
    gpu = torch.cuda.current_device() if device.index is None else device.index
    if not _cuda_has_room(gpu, dtype, head_dim, slots, rows):
        return (
            f"the cuda backend has no room on this GPU for groups of {slots} slots with a bias"
            f" table of {rows} rows"
        )
    return None


# A constant of the trace, as above. Dynamo would not see the decorator on the cached function.
@torch.compiler.assume_constant_result
def _cuda_has_room(
    device: int, dtype: torch.dtype, head_dim: int, group_size: int, table_rows: int
) -> bool:
    return _cuda_fits(device, dtype, head_dim, group_size, table_rows)


@functools.cache
def _cuda_fits(device: int, dtype: torch.dtype, *sizes: int) -> bool:
    library = ctypes.CDLL(str(library_file("_C_cuda")))
    element = (torch.float32, torch.bfloat16, torch.float16).index(dtype)
    found = library.greenmim_cuda_fits(device, element, *map(ctypes.c_int64, sizes))
    if found < 0:
        library.greenmim_cuda_fits_problem.restype = ctypes.c_char_p
        raise RuntimeError(library.greenmim_cuda_fits_problem().decode())
    return bool(found)
