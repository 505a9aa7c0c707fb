"""What the hardware counts while the kernels run: bytes, occupancy, why warps wait.

    python -m benchmarks.counters    # forward and backward of both backends in Nsight Compute

At Swin-B's first stage, batch 128, bfloat16, on a partition with capacity. Clocks are left as they
are. Ends with 77 and the reason where there is no ncu, or where it may not count.
"""

from __future__ import annotations

import argparse
import csv
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import torch

import greenmim_kernels as gk
from greenmim_kernels.testing import make_inputs, run

from .cases import BATCH, swin
from .environment import describe, folder_of, write_json

SKIPPED = 77  # exit code: nothing failed, and nothing was done
BACKENDS = ("cuda", "triton")
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)


def profiled() -> None:
    """What ncu looks at: one forward and backward pass of each backend that works here."""
    case = swin("swin-b", 1, BATCH["cuda"], dtype=torch.bfloat16, capacity=True)
    inputs = make_inputs(case, device="cuda")
    usable = gk.available_backends()
    for backend in (name for name in BACKENDS if not usable[name]):
        with gk.use_backend(backend):
            run(inputs)
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            run(inputs)
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


def command(log: pathlib.Path) -> list[str] | None:
    """The command line of ncu; None where it is not there."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    ncu = shutil.which("ncu", path=f"{os.environ.get('PATH', '')}:{home}/bin")
    if ncu is None:
        return None
    return [
        ncu, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw",
        "--log-file", str(log), "--kernel-name", "regex:attention", "--section", "Occupancy",
        "--section", "WarpStateStats", "--metrics", ",".join(METRICS),
        sys.executable, "-m", "benchmarks.counters", "--profiled",
    ]  # fmt: skip


def kernels_of(log: str) -> list[dict[str, str]]:
    """A row for each kernel from ncu's CSV: names, units, then values; "name [unit]" -> value."""
    lines = list(csv.reader(line for line in log.splitlines() if line.startswith('"')))
    if len(lines) < 3:
        return []
    names, units, *rows = lines
    keys = [f"{name} [{unit}]" if unit else name for name, unit in zip(names, units, strict=True)]
    return [dict(zip(keys, row, strict=True)) for row in rows]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profiled", action="store_true", help="run what is looked at")
    parser.add_argument("--dry-run", action="store_true", help="run nothing")
    options = parser.parse_args(argv)
    if options.dry_run:
        print(*(command(pathlib.Path("ncu.csv")) or ["there is no ncu"]))
        return 0
    if options.profiled:
        profiled()
        return 0
    with tempfile.TemporaryDirectory() as folder:
        log = pathlib.Path(folder) / "ncu.csv"
        if (arguments := command(log)) is None:
            print("there is no ncu; it comes with the CUDA toolkit (Nsight Compute)")
            return SKIPPED
        done = subprocess.run(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        said = done.stdout + (log.read_text() if log.exists() else "")
    kernels = kernels_of(said)
    if not kernels:
        lines = said.splitlines()
        refused = [line for line in lines if "NVGPUCTRPERM" in line or "LibraryNotLoaded" in line]
        print("\n".join(lines[-20:]))
        if refused:
            print(f"ncu may not count here: {refused[0]}")
            return SKIPPED
        return 1
    environment = describe(torch.get_num_threads(), "cuda" if torch.cuda.is_available() else "cpu")
    file = folder_of(environment["device"]) / "counters.json"
    write_json(file, {"environment": environment, "kernels": kernels})
    for kernel in kernels:
        shown = [key for key in kernel if key.split(" ")[0] in METRICS]
        print(kernel["Kernel Name"][:40], *(f"{key} {kernel[key]}" for key in shown), sep="  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
