"""What a result file says about where it was made."""

from __future__ import annotations

import json
import pathlib
import platform
import re
import subprocess

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def processor() -> str:
    """The processor's name, as the kernel gives it."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", pathlib.Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


def describe(threads: int) -> dict:
    """Device, versions and commit. ``dirty`` means that the code differs from the commit."""
    from greenmim_kernels.backends import cpu_capability

    return {
        "device": processor(),
        "cpu_capability": cpu_capability(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _git("rev-parse", "HEAD"),
        # Result files themselves do not make the code another one.
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results")),
    }


def folder_of(device: str) -> pathlib.Path:
    """benchmarks/results/<device>, in letters every file system takes."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def write_json(file: pathlib.Path, content: dict) -> None:
    """Write a result file whole or not at all; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".tmp")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(file)
