"""Search for the launch parameters of the Triton kernels on this GPU.

    python -m benchmarks.tune                   # measure every class and write the launch table
    python -m benchmarks.tune --only fwd-64     # classes whose name holds this
    python -m benchmarks.tune --dry-run         # say what would be measured, on any machine

Every candidate runs the same problem (Swin-B widths, batch 128) and is compared with what the
shipped launch computes before it is timed; one that differs, does not compile or does not fit is
left out. How many programs a multiprocessor holds is not searched for but read from the compiled
kernel.
The table is written whole, at the end and after an interruption.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys

import torch

from greenmim_kernels._triton import ahead_of_time, launch, operators
from greenmim_kernels.testing import Case, Inputs, make_inputs, relative_error

from .environment import describe, first_line, folder_of, write_json

DEVICE = "cuda"
CHANNELS = 128  # of Swin-B at stage 1
# The problem that stands for a tile: the widest windows whose groups have that many slots.
PROBLEMS = {
    "16": {"window_size": 4, "group_size": 16},
    "32": {"window_size": 5, "group_size": 32},
    "64": {"window_size": 7, "group_size": 64},
    "long": {"window_size": 14, "group_size": 208},
}
WARPS = {"16": (1, 2), "32": (1, 2, 4), "64": (2, 4, 8), "long": (2, 4, 8)}
STAGES = (1, 2, 3)
LONG_BLOCKS = (32, 64)


def architecture() -> int:
    """Of this GPU, or what a dry run is for."""
    return launch.architecture_of(torch.device(DEVICE if torch.cuda.is_available() else "cpu"))


def table() -> dict[str, launch.Launch]:
    """The launches that this GPU takes."""
    return launch.launch_table(architecture())


def candidates(name: str) -> list[launch.Launch]:
    """What is tried for a class, the shipped launch first."""
    tile = name.split("-")[1]
    blocks = LONG_BLOCKS if tile == "long" else (int(tile),)
    tried = [table()[name]]
    for warps, stages, block in itertools.product(WARPS[tile], STAGES, blocks):
        found = dataclasses.replace(tried[0], warps=warps, stages=stages, block=block)
        if found not in tried:
            tried.append(found)
    return tried


def resident(name: str) -> int:
    """Programs that a multiprocessor holds of the launch that stands in the table."""
    found = ahead_of_time.inspect(ahead_of_time.compile_launch(name, architecture()))
    return ahead_of_time.resident(found, table()[name].warps, architecture())


def problem_of(name: str, batch: int) -> Inputs:
    """Inputs of a class."""
    _, tile, head_dim, precision = name.split("-")
    case = Case(
        batch=batch,
        head_dim=int(head_dim),
        num_heads=CHANNELS // int(head_dim),
        dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
        **PROBLEMS[tile],
    )
    return make_inputs(case, device=DEVICE)


def runner(name: str, inputs: Inputs):
    """A function that runs the kernels of a class once and returns what they wrote."""
    part = inputs.part
    sizes = (inputs.num_heads, *part.window_size, 0.2)
    arguments = (inputs.table, part.token_index, part.window_id, part.coords)
    saved = operators.group_window_attention(inputs.qkv, *arguments, *sizes)
    kernel = name.split("-")[0]
    if kernel == "fwd":
        return lambda: operators.group_window_attention(inputs.qkv, *arguments, *sizes)
    # The kernels of a long backward pass run together; each is tuned with the others as they are.
    return lambda: operators.group_window_attention_backward(
        inputs.grad_out, inputs.qkv, inputs.table, *saved, *arguments[1:], *sizes, True, True
    )


def tune(name: str, batch: int) -> list[dict]:
    """Measure the candidates of a class; rows sorted by time, the fastest first."""
    import triton.testing

    launches = table()
    shipped = launches[name]
    run = runner(name, problem_of(name, batch))
    expected = [tensor.clone() for tensor in run()]
    rows = []
    try:
        for candidate in candidates(name):
            launches[name] = candidate
            row = dataclasses.asdict(candidate)
            try:
                row["resident"] = resident(name)
                launches[name] = launch.Launch(**row)
                errors = [relative_error(a, b) for a, b in zip(run(), expected, strict=True)]
                if max(errors) > 1e-2:
                    row["refused"] = f"differs by {max(errors):.1e}"
                else:
                    times = triton.testing.do_bench(run, quantiles=[0.5, 0.2, 0.8])
                    row |= dict(zip(("ms", "ms_p20", "ms_p80"), times, strict=True))
            except Exception as error:  # out of resources, or the compiler gives up
                row["refused"] = first_line(error)[:140]
            rows.append(row)
    finally:
        launches[name] = shipped
    return sorted(rows, key=lambda row: row.get("ms", float("inf")))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of a class's name")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dry-run", action="store_true", help="measure nothing")
    options = parser.parse_args(argv)
    names = [name for name in table() if options.only in name]
    if options.dry_run:
        for name in names:
            print(f"{name:<28}{len(candidates(name)):>4} candidates")
        return 0
    if not torch.cuda.is_available():
        print(
            "benchmarks.tune needs a CUDA device; --dry-run says what it would do.", file=sys.stderr
        )
        return 2
    device = torch.cuda.get_device_name()
    results, best = {}, dict(table())
    try:
        for name in names:
            results[name] = rows = tune(name, options.batch)
            if "ms" in rows[0]:
                best[name] = launch.Launch(
                    **{k: rows[0][k] for k in dataclasses.asdict(best[name])}
                )
            print(f"{name:<28}{rows[0].get('ms', float('nan')):>9.4f} ms  {best[name]}", flush=True)
    finally:
        folder = folder_of(device)
        environment = {**describe(torch.get_num_threads()), "device": device}
        write_json(folder / "tune.json", {"environment": environment, "classes": results})
        launch.save(best, architecture())
    return 0


if __name__ == "__main__":
    sys.exit(main())
