"""What a result file says about where it was made."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def first_line(error: BaseException) -> str:
    """Why a row has no figure: the error's type and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _git(*arguments: str) -> str | None:
    """What git says; None where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def processor() -> str:
    """The processor's name, as the kernel gives it."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", pathlib.Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


def driver() -> str | None:
    """The version of NVIDIA's driver; None without one."""
    with contextlib.suppress(OSError):
        text = pathlib.Path("/sys/module/nvidia/version").read_text().strip()
        return text or None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.splitlines()[0].strip()
    return None


def version_of(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def describe(threads: int, device: str = "cpu") -> dict:
    """Device, versions and commit. ``dirty`` means that the code differs from the commit.

    Outside a repository the commit is the one that the variable GREENMIM_COMMIT names, if any.

    Args:
        threads: of the CPU.
        device: what is measured, "cpu" or a CUDA device.
    """
    capability = None
    with contextlib.suppress(ImportError, RuntimeError):  # not built yet
        from greenmim_kernels.backends import cpu_capability

        capability = cpu_capability()
    is_cuda = torch.device(device).type == "cuda"
    # Result files themselves do not make the code another one.
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else processor(),
        "driver": driver() if is_cuda else None,
        "cpu_capability": capability,
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "commit": _git("rev-parse", "HEAD") or os.environ.get("GREENMIM_COMMIT"),
        "dirty": None if changes is None else bool(changes),
    }


# What a figure is a figure of.
MEASURED_CODE = (
    "csrc",
    "greenmim_kernels",
    ":!greenmim_kernels/testing.py",  # what checks it does not change it
    "benchmarks/naive.py",
)


def changed_since(commit: str | None, paths: tuple[str, ...] = MEASURED_CODE) -> bool | None:
    """Whether the code at `paths` differs between a commit and HEAD.

    None where git cannot tell: no repository, or the commit is unknown or not in it.
    """
    if commit is None:
        return None
    command = ["git", "diff", "--quiet", commit, "HEAD", "--", *paths]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True)
    except OSError:  # no git
        return None
    return {0: False, 1: True}.get(done.returncode)


def folder_of(device: str) -> pathlib.Path:
    """benchmarks/results/<device>, in letters every file system takes."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def earlier(file: pathlib.Path, environment: dict, of_any_commit: bool = False) -> dict:
    """What a result file holds of the same place, and the same code unless its rows name theirs;
    nothing else counts."""
    if not file.exists():
        return {}
    content = json.loads(file.read_text())
    apart = ("commit", "dirty") if of_any_commit else ()
    same = [
        {key: value for key, value in one.items() if key not in apart}
        for one in (content["environment"], environment)
    ]
    return content if same[0] == same[1] else {}


def rows_with_commits(content: dict) -> list[dict]:
    """Rows of a result file, each with the commit that it was measured at, which is the file's
    where it names none: for a file that is of another commit from now on."""
    environment = content.get("environment")
    return [
        row | {name: row.get(name, environment[name]) for name in ("commit", "dirty")}
        for row in content.get("rows", [])
    ]


def put(rows: list[dict], row: dict, key: tuple[str, ...]) -> None:
    """Add a row, in the place of the earlier one that is the same in `key` if there is one.

    One that was not timed takes no figure's place, unless the result was wrong.
    """
    tells = "reason" not in row or row["reason"].startswith("wrong")
    for number, other in enumerate(rows):
        if all(other[name] == row[name] for name in key):
            if tells or "reason" in other:
                rows[number] = row
            return
    rows.append(row)


def write_json(file: pathlib.Path, content: dict) -> None:
    """Write a result file whole or not at all; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".tmp")
    with beside.open("w") as out:
        out.write(json.dumps(content, indent=1) + "\n")
        out.flush()
        os.fsync(out.fileno())
    beside.replace(file)
