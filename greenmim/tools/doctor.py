"""What is installed here, which kernels work, and why others do not."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform

import torch

import greenmim
from greenmim.messages import columns
from greenmim_kernels import automatic, available_backends
from greenmim_kernels.backends import (
    ENVIRONMENT_VARIABLE,
    OPERATORS,
    automatic_backend,
    cpu_capability,
    load_library,
)

PACKAGES = (
    *("torchvision", "timm", "numpy", "triton", "safetensors", "pillow", "matplotlib"),
    *("jsonargparse", "tensorboard", "filelock", "submitit", "webdataset", "datasets"),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def report() -> str:
    """Say what is installed, which backends work here, and why others do not."""
    lines = ["installed"]
    lines += _table(
        [
            ("greenmim", greenmim.__version__),
            ("python", f"{platform.python_version()} ({platform.platform()})"),
            ("torch", f"{torch.__version__} ({_torch_build()})"),
            *((name, _version(name)) for name in PACKAGES),
        ]
    )
    lines += ["", "machine"]
    lines += _table(
        [
            (
                "cpu",
                f"{len(os.sched_getaffinity(0))} cores, torch uses {torch.get_num_threads()}"
                f" threads and {torch.backends.cpu.get_cpu_capability()}",
            ),
            *(("gpu", text) for text in _gpus()),
        ]
    )
    lines += ["", "compiled modules of greenmim_kernels"]
    lines += _table(
        [
            ("_C_partition", _importable("greenmim_kernels._planner")),
            ("_C", _loadable("_C")),
            ("_C_cuda", _loadable("_C_cuda")),
        ]
    )
    lines += ["", "backends"]
    lines += _table([(name, _state(name, reason)) for name, reason in available_backends().items()])
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    lines += [
        "",
        f'"auto" takes{f" (but {ENVIRONMENT_VARIABLE}={forced} is set)" if forced else ""}',
    ]
    lines += _choices()
    lines += ["", "of a GPU's two backends it takes, and why"]
    why = {name: f"{found.backend}: {found.reason}" for name, found in automatic.choices().items()}
    if len(set(why.values())) == 1:
        why = {"everything": next(iter(why.values()))}
    lines += _table(list(why.items()))
    return "\n".join(lines)


def _choices() -> list[str]:
    """Rows device and operator, columns dtype: the backend that "auto" takes."""
    rows = [("", "", *(str(dtype).removeprefix("torch.") for dtype in DTYPES))]
    has_gpu = torch.cuda.is_available()
    for device in ("cpu", "cuda") if has_gpu else ("cpu",):
        for operator in OPERATORS:
            chosen = (automatic_backend(operator, device, dtype) for dtype in DTYPES)
            rows.append((device, operator, *chosen))
    lines = _table(rows)
    if not has_gpu:
        lines.append("  cuda  no GPU here; see the table below")
    return lines


def _state(name: str, reason: str | None) -> str:
    if reason is not None:
        return f"not here: {reason}"
    return f"works ({cpu_capability()})" if name == "cpp" else "works"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    return [f"  {line}" for line in columns(rows)]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _torch_build() -> str:
    return f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return ["torch sees no CUDA device"]
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.append(
            f"{index}: {facts.name}, sm_{facts.major}{facts.minor},"
            f" {facts.total_memory / 2**30:.0f} GiB"
        )
    return found


def _importable(name: str) -> str:
    try:
        importlib.import_module(name)
    except ImportError as error:
        return f"missing: {error}"
    return "present"


def _loadable(name: str) -> str:
    reason = load_library(name)
    return "present" if reason is None else f"missing: {reason}"
