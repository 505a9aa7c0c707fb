"""Search for the launch parameters of the Triton kernels on this GPU.

    python -m benchmarks.tune                   # measure every class and write the launch table
    python -m benchmarks.tune --only fwd-64     # classes whose name holds this
    python -m benchmarks.tune --dry-run         # say what would be measured, on any machine

Every candidate runs the same problem (Swin-B widths, batch 128) and is compared with the reference,
and with itself, before it is timed, in CUDA graphs; one that differs, does not compile or does not
fit is left out. How many programs a multiprocessor holds is not searched for but read from
the compiled kernel. The table is written whole after every class, those of Swin first.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable

import torch

import greenmim_kernels as gk
from greenmim_kernels._triton import ahead_of_time, launch, operators
from greenmim_kernels.testing import Case, Inputs, make_inputs, operator_arguments, relative_error

from .environment import describe, earlier, first_line, folder_of, write_json
from .measure import measure_graph

DEVICE = "cuda"
CHANNELS = 128  # of Swin-B at stage 1
# The problem that stands for a tile: the widest windows whose groups have that many slots.
PROBLEMS = {
    "16": {"window_size": 4, "group_size": 16},
    "32": {"window_size": 5, "group_size": 32},
    "64": {"window_size": 7, "group_size": 64},
    "long": {"window_size": 14, "group_size": 208},
}
SCALE = 0.2
LEAST_GAIN = 0.02  # of the shipped launch's time, for another to take its place
WARPS = {16: (1, 2), 32: (1, 2, 4), 64: (2, 4, 8)}  # of a program, by its slots
STAGES = (1, 2, 3)


def architecture() -> int:
    """Of this GPU, or what a dry run is for."""
    return launch.architecture_of(torch.device(DEVICE if torch.cuda.is_available() else "cpu"))


def table() -> dict[str, launch.Launch]:
    """The launches that this GPU takes."""
    return launch.launch_table(architecture())


def candidates(name: str) -> list[launch.Launch]:
    """What is tried for a class, the shipped launch first."""
    tile = name.split("-")[1]
    tried = [table()[name]]
    for block in WARPS if tile == "long" else (int(tile),):
        for warps, stages in itertools.product(WARPS[block], STAGES):
            found = dataclasses.replace(tried[0], warps=warps, stages=stages, block=block)
            if found not in tried:
                tried.append(found)
    return tried


def resident(name: str, run: Callable[[], object]) -> int:
    """Programs of a class that a multiprocessor holds, by the kernel that `run` launches."""
    kernel = ahead_of_time.kernel_of(name)
    original, launched = kernel.run, []

    def launch_and_keep(*arguments, **more):
        launched.append(original(*arguments, **more))

    kernel.run = launch_and_keep
    try:
        run()
    finally:
        del kernel.run  # that of the class is there again
    (compiled,) = launched
    found = {"registers": compiled.n_regs, "shared_bytes": compiled.metadata.shared}
    return launch.resident(found, compiled.metadata.num_warps, architecture())


def problem_of(name: str, batch: int) -> Inputs:
    """Inputs of a class."""
    _, tile, head_dim, precision = name.split("-")
    case = Case(
        batch=batch,
        head_dim=int(head_dim),
        num_heads=CHANNELS // int(head_dim),
        dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
        capacity=True,  # as in training
        **PROBLEMS[tile],
    )
    return make_inputs(case, device=DEVICE)


def runner(name: str, inputs: Inputs):
    """A function that runs the kernels of a class once and returns what they wrote."""
    # The kernels of a long backward pass run together; each is tuned with the others as they are.
    operator = "group_window_attention" + ("" if name.startswith("fwd") else "_backward")
    arguments = operator_arguments(operator, inputs, SCALE, "_triton")
    call = getattr(operators, operator)
    return lambda: [x for x in call(*arguments) if x.numel()]


def reference_of(name: str, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """What a class has to compute: the output, or both gradients."""
    leaves = [x.detach().requires_grad_() for x in (inputs.qkv, inputs.table)]
    with gk.use_backend("reference"):
        out = gk.group_window_attention(*leaves, inputs.part, inputs.num_heads, SCALE)
    if name.startswith("fwd"):
        return (out.detach(),)
    return torch.autograd.grad(out, leaves, inputs.grad_out)


def tune(name: str, batch: int) -> list[dict]:
    """Measure the candidates of a class; rows sorted by time, the fastest first."""
    launches = table()
    shipped = launches[name]
    inputs = problem_of(name, batch)
    run = runner(name, inputs)
    expected = reference_of(name, inputs)
    rows = []
    try:
        for candidate in candidates(name):
            launches[name] = candidate
            row = dataclasses.asdict(candidate)
            try:
                row["resident"] = resident(name, run)
                launches[name] = launch.Launch(**row)
                first = [tensor.clone() for tensor in run()]
                errors = [relative_error(a, b) for a, b in zip(first, expected, strict=False)]
                steady = all(
                    torch.equal(a, b) for _ in range(3) for a, b in zip(run(), first, strict=True)
                )
                if max(errors) > 1e-2:
                    row["refused"] = f"differs from the reference by {max(errors):.1e}"
                elif not steady:
                    row["refused"] = "differs between runs"
                else:
                    found = measure_graph(run, rounds=10)
                    times = {"ms": found.median, "ms_p20": found.p20, "ms_p80": found.p80}
                    row |= {key: 1e3 * value for key, value in times.items()}
            except Exception as error:  # out of resources, or the compiler gives up
                row["refused"] = first_line(error)[:140]
            rows.append(row)
    finally:
        launches[name] = shipped
    return sorted(rows, key=lambda row: row.get("ms", float("inf")))


def ordered(names: Iterable[str]) -> list[str]:
    """Swin's classes first, of them the tile that its stages 1 to 3 take: what a run cut short
    should have."""
    return sorted(names, key=lambda name: (not name.endswith("-32-16bit"), "-64-" not in name))


def best_of(rows: list[dict], shipped: launch.Launch) -> tuple[dict, str]:
    """The row to take, which is the shipped launch's unless another gains enough, and a word on it.

    How many programs are resident is not chosen, and differs between GPUs.
    """
    names = ("warps", "stages", "block")
    for row in rows:
        is_shipped = "ms" in row and all(row[name] == getattr(shipped, name) for name in names)
        if is_shipped and rows[0]["ms"] > (1 - LEAST_GAIN) * row["ms"]:
            return row, "as shipped"
    return rows[0], ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of a class's name")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="start no class after these"
    )
    parser.add_argument("--dry-run", action="store_true", help="measure nothing")
    options = parser.parse_args(argv)
    until = time.monotonic() + 60 * options.minutes
    names = ordered(name for name in table() if options.only in name)
    if options.dry_run:
        for name in names:
            print(f"{name:<28}{len(candidates(name)):>4} candidates")
        return 0
    if DEVICE == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks.tune needs a CUDA device; --dry-run says what it would do.", file=sys.stderr
        )
        return 2
    environment = describe(torch.get_num_threads(), DEVICE)
    file = folder_of(environment["device"]) / "tune.json"
    results = earlier(file, environment).get("classes", {})
    best = dict(table())
    failed = False
    for name in names:
        if time.monotonic() > until:
            print(f"{name:<28}not reached", flush=True)
            continue
        try:
            results[name] = rows = tune(name, options.batch)
        except Exception as error:  # the shipped launch itself fails
            results[name] = rows = [{"refused": first_line(error)[:140]}]
        row, said = best_of(rows, best[name])
        if "ms" in row:
            best[name] = launch.Launch(**{k: row[k] for k in dataclasses.asdict(best[name])})
            print(f"{name:<28}{row['ms']:>9.4f} ms  {said or best[name]}", flush=True)
        else:
            failed = True
            print(f"{name:<28}not tuned: {rows[0]['refused']}", flush=True)
        launch.save(best, architecture())
        write_json(file, {"environment": environment, "classes": results})
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
