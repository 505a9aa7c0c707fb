"""Training steps side by side: images per second, memory, energy.

    python -m benchmarks.steps                       # what this machine can run
    python -m benchmarks.steps --problem base-224 --variant naive cuda-graphed --no-save

A step is the forward pass, the backward pass and fused AdamW, on images that are on the device,
with another mask in every step. All variants of a problem train the same weights; the loss and the
first block's gradient of each are compared with the reference's in float32 before it is timed, and
what is off is not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .costs import Widths, floor_seconds, step_work
from .environment import describe, folder_of, write_json
from .measure import Energy, Rates, Sampler, Timing, measure_rates, no_garbage_collection
from .step_processes import StepProcess, checked_step, first_line, first_row
from .step_variants import (
    CPU_PROBLEMS,
    CUDA_PROBLEMS,
    DTYPES,
    Problem,
    Step,
    Variant,
    reference,
    variants,
)

WARM_UP = 4  # steps: AdamW's memory, compilation, the growth of the heap
# Seconds before a CPU's step: OpenMP's threads in another variant's process wait for work that long
# at most before they sleep, and would take a core meanwhile.
PAUSE = 0.1


def measured_rows(
    problem: Problem, chosen: list[Variant], device: str, rounds: int, rates: Rates, save: Callable
) -> None:
    """Measure variants of a problem; `save` is called with each row as it is done."""
    try:
        expected = reference(problem, device)
    except RuntimeError as error:  # out of memory
        for variant in chosen:
            save({**first_row(problem, variant), "reason": first_line(error)})
        return
    if device == "cpu":
        for row in _in_turn(problem, chosen, expected, rounds, rates):
            save(row)
        return
    for variant in chosen:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        row, step = checked_step(problem, variant, device, expected)
        if step is not None:
            try:
                row |= _on_gpu(step, problem, rounds, rates, row)
            except RuntimeError as error:
                row["reason"] = first_line(error)
        save(row)
        del step  # its memory
        gc.collect()


def _on_gpu(step: Step, problem: Problem, rounds: int, rates: Rates, row: dict) -> dict:
    sample = Sampler(step, "cuda")
    with no_garbage_collection():
        for _ in range(3):
            sample()
        timing = Timing.of([sample() for _ in range(rounds)])
        # Since before the step was made: a graph allocates when it is recorded, not when it runs.
        peak = torch.cuda.max_memory_allocated()
        count = max(rounds, int(2.0 / timing.median))  # two seconds, for the energy counter
        with Energy("cuda") as energy:
            for _ in range(count):
                step()
    joules = None if energy.joules is None else energy.joules / (count * problem.batch)
    return {
        **_figures(timing, problem, step.variant, rates, row),
        "peak_memory_bytes": peak,
        "joules_per_image": joules,
        "joules_from": energy.source,
    }


def _in_turn(
    problem: Problem,
    chosen: list[Variant],
    expected: tuple[float, Tensor],
    rounds: int,
    rates: Rates,
) -> Iterator[dict]:
    """On a CPU other work comes and goes: the variants take turns, and share what it costs."""
    with contextlib.ExitStack() as stack:
        ready: list[tuple[StepProcess, Variant, list[tuple[float, int]]]] = []
        for variant in chosen:
            process = StepProcess(problem, variant, expected)
            stack.callback(process.close)
            if "reason" in process.row:
                yield process.row
            else:
                ready.append((process, variant, []))
        for number in range(WARM_UP + rounds):
            for process, _, samples in ready:
                time.sleep(PAUSE)
                sample = process()
                if number >= WARM_UP:
                    samples.append(sample)
        for process, variant, samples in ready:
            seconds, pages = zip(*samples, strict=True)
            figures = _figures(Timing.of(seconds), problem, variant, rates, process.row)
            figures |= {"page_faults": statistics.median(pages)}
            yield {**process.row, **figures, "peak_memory_bytes": None, "joules_per_image": None}


def _figures(timing: Timing, problem: Problem, variant: Variant, rates: Rates, row: dict) -> dict:
    act = DTYPES[problem.precision].itemsize
    figures = {
        "seconds": timing.median,
        "images_per_second": problem.batch / timing.median,
        "p20": problem.batch / timing.p80,
        "p80": problem.batch / timing.p20,
        "rounds": timing.n,
        "floor_ms": None,
    }
    if variant.kind != "dense":
        work = step_work(
            problem.config, problem.batch, problem.mask_ratio, row["parameters"], Widths(act=act)
        )
        product = rates.matrix_flops_per_second[str(DTYPES[problem.precision]).split(".")[1]]
        floor = floor_seconds(work, rates.copy_bytes_per_second, product)
        figures |= {"floor_ms": 1e3 * floor, "of_floor": floor / timing.median}
    return figures


def rows_to_keep(file: pathlib.Path, environment: dict, measured: set[str]) -> list[dict]:
    """Rows of other problems that the same code gave in the same place."""
    if not file.exists():
        return []
    earlier = json.loads(file.read_text())
    if earlier["environment"] != environment:
        return []
    return [row for row in earlier["rows"] if row["model"] not in measured]


def main(argv: list[str] | None = None) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    problems = CUDA_PROBLEMS if device == "cuda" else CPU_PROBLEMS
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", nargs="+", choices=[p.name for p in problems])
    parser.add_argument("--variant", nargs="+", choices=[v.name for v in variants(device)])
    parser.add_argument("--others", action="store_true", help="all problems but the first")
    parser.add_argument("--rounds", type=int, default=20 if device == "cuda" else 7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of a CPU")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no problem after these")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    start = time.monotonic()
    chosen = [v for v in variants(device) if not options.variant or v.name in options.variant]
    problems = problems[1:] if options.others else problems
    problems = [p for p in problems if not options.problem or p.name in options.problem]
    rates = measure_rates(device, sorted({DTYPES[p.precision] for p in problems}, key=str))
    result = {
        "environment": describe(options.threads, device),
        "rates": dataclasses.asdict(rates),
        "rows": [],
    }
    file = folder_of(result["environment"]["device"]) / "steps.json"
    result["rows"] = rows_to_keep(file, result["environment"], {p.name for p in problems})

    def save(row: dict) -> None:
        result["rows"].append(row)
        speed = row.get("images_per_second")
        said = row.get("reason") if speed is None else (
            f"{speed:9.1f} images/s   {1e3 * row['seconds']:9.1f} ms"
            + (f"   floor {row['floor_ms']:.1f} ms" if row["floor_ms"] else "")
        )  # fmt: skip
        print(f"{row['model']:<20}{row['precision']:<6}{row['variant']:<30}{said}", flush=True)
        if not options.no_save:
            write_json(file, result)

    for problem in problems:
        if time.monotonic() - start < 60 * options.minutes:
            measured_rows(problem, chosen, device, options.rounds, rates, save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
