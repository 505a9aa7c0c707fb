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
import re
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
# What is kept of what ncu counts, by its name.
METRICS = {
    "gpu__time_duration.sum": "nanoseconds",
    "dram__bytes_read.sum": "bytes_read",
    "dram__bytes_write.sum": "bytes_written",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "l2_percent",
    "l1tex__throughput.avg.pct_of_peak_sustained_active": "l1_percent",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "blocks",
    "smsp__inst_executed.sum": "instructions",
    "smsp__issue_active.avg.per_cycle_active": "issued_per_scheduler_and_cycle",
    "smsp__warps_active.avg.per_cycle_active": "warps_per_scheduler",
}
# Warps of a scheduler that wait, on average, while it issues an instruction; by what for.
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active.ratio")


def profiled(backend: str) -> None:
    """What ncu looks at: one forward and backward pass of a backend."""
    case = swin("swin-b", 1, BATCH["cuda"], dtype=torch.bfloat16, capacity=True)
    inputs = make_inputs(case, device="cuda")
    with gk.use_backend(backend):
        run(inputs)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        run(inputs)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def command(log: pathlib.Path, backend: str) -> list[str] | None:
    """The command line of ncu; None where it is not there."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    ncu = shutil.which("ncu", path=f"{os.environ.get('PATH', '')}:{home}/bin")
    if ncu is None:
        return None
    return [
        ncu, "--clock-control", "none", "--profile-from-start", "off",
        "--csv", "--page", "raw", "--print-units", "base",
        "--log-file", str(log), "--kernel-name", "regex:attention", "--section", "Occupancy",
        "--section", "WarpStateStats", "--metrics", ",".join(METRICS),
        sys.executable, "-m", "benchmarks.counters", "--profiled", backend,
    ]  # fmt: skip


def kernels_of(log: str) -> list[dict]:
    """A row for each kernel from ncu's CSV, which has names, units, and then values."""
    lines = list(csv.reader(line for line in log.splitlines() if line.startswith('"')))
    if len(lines) < 3:
        return []
    names, _, *values = lines
    rows = []
    for line in values:
        of = dict(zip(names, line, strict=True))
        counted = {
            ours: float(of[name].replace(",", "")) for name, ours in METRICS.items() if name in of
        }
        stalls = {
            found[1]: float(value)
            for name, value in of.items()
            if (found := STALL.fullmatch(name)) and float(value) >= 0.01
        }
        rows.append({"kernel": of["Kernel Name"], **counted, "stalls": stalls})
    return rows


def count(backend: str) -> tuple[int, list[dict]]:
    """An exit code, and what ncu counted of one backend's kernels; says what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        log = pathlib.Path(folder) / "ncu.csv"
        if (arguments := command(log, backend)) is None:
            print("there is no ncu; it comes with the CUDA toolkit (Nsight Compute)")
            return SKIPPED, []
        done = subprocess.run(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        said = done.stdout + (log.read_text() if log.exists() else "")
    if kernels := kernels_of(said):
        return 0, kernels
    lines = said.splitlines()
    refused = [line for line in lines if "NVGPUCTRPERM" in line or "LibraryNotLoaded" in line]
    print("\n".join(lines[-20:]))
    if refused:
        print(f"ncu may not count here: {refused[0]}")
        return SKIPPED, []
    return 1, []


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profiled", choices=BACKENDS, help="run what is looked at")
    parser.add_argument("--dry-run", action="store_true", help="run nothing")
    options = parser.parse_args(argv)
    if options.dry_run:
        for backend in BACKENDS:
            print(*(command(pathlib.Path("ncu.csv"), backend) or ["there is no ncu"]))
        return 0
    if options.profiled:
        profiled(options.profiled)
        return 0
    environment = describe(torch.get_num_threads(), "cuda" if torch.cuda.is_available() else "cpu")
    file = folder_of(environment["device"]) / "counters.json"
    codes, kernels = [], []
    for backend in BACKENDS:  # ncu writes at its end: one run for each, so that the first is kept
        code, counted = count(backend)
        codes.append(code)
        if not counted:
            continue
        kernels += counted
        write_json(file, {"environment": environment, "kernels": kernels})
        for row in counted:
            shown = (f"{key} {row[key]:g}" for key in METRICS.values() if key in row)
            print(row["kernel"][:40], *shown, sep="  ")
    return 1 if 1 in codes else min(codes)


if __name__ == "__main__":
    sys.exit(main())
