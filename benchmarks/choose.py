"""Measure the two GPU backends against each other and write the table that "auto" follows.

    python -m benchmarks.choose              # every class, forward and backward
    python -m benchmarks.choose --dry-run    # say what would be measured, on any machine

Every class runs Swin-B's first stage at batch 128 on a partition with capacity, forward and
backward, in CUDA graphs, under both backends in turn; the one with the smaller median is taken. The
table is written whole after every class, Swin's first; a class where a backend fails, or where they
differ, is left as it was, with the name of the device that it was measured on if that is another.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable

import torch

import greenmim_kernels as gk
from greenmim_kernels import automatic
from greenmim_kernels.testing import Case, Inputs, make_inputs, relative_error, run

from .convolution import CONVOLUTION, conv_inputs
from .environment import describe, earlier, first_line, folder_of, write_json
from .measure import measure_graph

BACKENDS = ("cuda", "triton")
DEVICE = "cuda"
CHANNELS = 128  # of Swin-B at stage 1
WINDOWS = {"short": 7, "long": 14}
ROUNDS = 5
FIRST = "-32-16bit"  # Swin's classes: what a run cut short should have


def problem_of(name: str, batch: int, device: str) -> Inputs:
    """Inputs of a class; of the copies, those of the attention around them."""
    if name in automatic.SINGLE_CLASS:
        length, head_dim, precision = "short", 32, "16bit"
    else:
        _, length, head_dim, precision = name.split("-")
    case = Case(
        batch=batch,
        window_size=WINDOWS[length],
        head_dim=int(head_dim),
        num_heads=CHANNELS // int(head_dim),
        dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
        capacity=True,
    )
    make = conv_inputs if name == CONVOLUTION else make_inputs
    return make(case, device=device)


def work_of(name: str, inputs: Inputs) -> Callable[[], dict[str, torch.Tensor]]:
    """A function that runs a class once, in the backend in force."""
    if name == "group_gather":
        return lambda: {"out": gk.group_gather(inputs.qkv, inputs.part)}
    if name == "group_scatter":
        with gk.use_backend("reference"):
            groups = gk.group_gather(inputs.qkv, inputs.part)
        return lambda: {"out": gk.group_scatter(groups, inputs.part)}
    return lambda: run(inputs, inputs.conv if name == CONVOLUTION else gk.group_window_attention)


def milliseconds(call: Callable[[], object]) -> float:
    return measure_graph(call).median * 1e3


def measure(name: str, batch: int, clock: Callable[[Callable], float]) -> dict:
    """Median milliseconds of each backend, taken in turn, and the faster one.

    Args:
        clock: milliseconds of one call of a function.

    Raises:
        RuntimeError: the two disagree.
    """
    work = work_of(name, problem_of(name, batch, DEVICE))
    times: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    results = {}
    for _ in range(ROUNDS):
        for backend in BACKENDS:
            with gk.use_backend(backend):
                results[backend] = work()
                times[backend].append(clock(work))
    for key, value in results["cuda"].items():
        if (error := relative_error(value, results["triton"][key])) > 2e-2:
            raise RuntimeError(f"{name}: cuda and triton differ in {key} by {error:.1e}")
    medians = {backend: statistics.median(found) for backend, found in times.items()}
    row = {"backend": min(medians, key=medians.__getitem__)}
    return row | {f"{backend}_ms": value for backend, value in medians.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="start no class after these"
    )
    parser.add_argument("--dry-run", action="store_true", help="measure nothing")
    options = parser.parse_args(argv)
    until = time.monotonic() + 60 * options.minutes
    names = sorted(automatic.choices(), key=lambda name: not name.endswith(FIRST))
    if options.dry_run:
        print("\n".join(names))
        return 0
    if missing := [f"{name}: {why}" for name, why in gk.available_backends().items()
                   if name in BACKENDS and why]:  # fmt: skip
        print(f"benchmarks.choose needs both GPU backends; {'; '.join(missing)}", file=sys.stderr)
        return 2
    environment = describe(torch.get_num_threads(), DEVICE)
    device = environment["device"]
    file = folder_of(device) / "choose.json"
    rows = earlier(file, environment).get("classes", {})
    table = automatic.table()
    elsewhere = {} if table["device"] == device else {"device": table["device"]}
    chosen = {name: {**elsewhere, **row} for name, row in table["classes"].items()}
    failed = measured = False
    for name in names:
        if time.monotonic() > until:
            print(f"{name:<28}not reached", flush=True)
            continue
        try:
            rows[name] = chosen[name] = measure(name, options.batch, milliseconds)
            measured = True
        except Exception as error:  # a kernel's, a compiler's, or the two differ
            rows[name], failed = {"reason": first_line(error)[:200]}, True
        print(f"{name:<28}{rows[name]}", flush=True)
        content = {"environment": environment, "batch": options.batch, "classes": rows}
        write_json(file, content)
        if measured:
            write_json(automatic.TABLE, {"device": device, "classes": chosen})
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
