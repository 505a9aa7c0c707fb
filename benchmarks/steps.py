"""Training steps side by side: images per second, memory, energy.

    python -m benchmarks.steps                       # what this machine can run
    python -m benchmarks.steps --problem base-224 --variant naive cuda-graphed --no-save

A step is the forward pass, the backward pass, the gradient's norm and fused AdamW, on images that
are on the device, with another mask in every step. All variants of a problem train the same
weights; the loss and all gradients of each are compared with the reference's in float32 before it
is timed, and what is off is not timed. The step of SimMIM, another model, is compared with itself.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import pathlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import torch

from .costs import Widths, covers, floor_seconds, step_work
from .environment import (
    describe,
    earlier,
    first_line,
    folder_of,
    put,
    rows_with_commits,
    write_json,
)
from .measure import Energy, Rates, Sampler, Timing, measure_rates, no_garbage_collection
from .step_processes import (
    Child,
    Ended,
    StepProcess,
    checked_step,
    first_row,
    load_reference,
    save_reference,
    when_told,
)
from .step_variants import CPU_PROBLEMS, CUDA_PROBLEMS, DTYPES, Problem, Step, Variant, variants

WARM_UP = 4  # steps: compilation, the growth of the heap
# Steps of a variant's turn on a CPU: a run has its steps one after the other too. The first finds
# the caches full of another variant's arrays and is not counted.
TURN = 4
# Seconds before a turn: OpenMP's threads in another variant's process wait for work that long
# at most before they sleep, and would take a core meanwhile.
PAUSE = 0.1
# A variant's process on a GPU may take so long; most of it is compilation.
GPU_SECONDS = 300.0


def measured_rows(
    chosen: list[tuple[Problem, Variant]],
    device: str,
    rounds: int,
    rates: Rates,
    save: Callable[[dict], None],
    until: float = math.inf,
    at_once: bool = False,
) -> None:
    """Measure variants of problems, on a CPU of one; `save` is called with each row as it is done.

    Args:
        until: on a GPU nothing is begun after this moment of the monotonic clock.
        at_once: on a GPU all are compiled and checked side by side before the first is timed; they
            have to fit into its memory together.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:

        def begun(work: Callable, *arguments: object) -> Child:
            return stack.enter_context(contextlib.closing(Child(work, *arguments)))

        def file_of(problem: Problem, variant: Variant) -> pathlib.Path:
            return pathlib.Path(folder) / f"{problem.name}-{variant.kind == 'dense'}.pt"

        # On a GPU all import what they need at once, and go on when they are told.
        beside = len(chosen) if at_once else 1
        waiting = [
            (one, begun(when_told, _on_gpu, *one, file_of(*one), rounds, rates, beside))
            for one in chosen
            if device != "cpu"
        ]
        needed = {file_of(*one): one for one in chosen}
        references = {
            file: begun(save_reference, problem, variant.kind == "dense", device, file)
            for file, (problem, variant) in needed.items()
        }
        failed = {}
        for file, child in references.items():
            try:
                reason = child.hear()
            except Ended as error:
                reason = str(error)
            child.close()
            if reason:
                failed[file] = f"no reference: {reason}"
        for one in chosen:
            if reason := failed.get(file_of(*one)):
                save({**first_row(*one), "reason": reason})
        if device == "cpu":
            left = [(variant, file_of(p, variant)) for p, variant in chosen]
            left = [(variant, file) for variant, file in left if file not in failed]
            for row in _in_turn(chosen[0][0], left, rounds, rates):
                save(row)
            return
        waiting = [(one, child) for one, child in waiting if file_of(*one) not in failed]
        for batch in [waiting] if at_once else [[one] for one in waiting]:
            if time.monotonic() > until:
                for one, _ in batch:
                    save({**first_row(*one), "reason": "no time was left"})
                continue
            _gpu_rows(batch, save, until)


def _gpu_rows(
    batch: list[tuple[tuple[Problem, Variant], Child]], save: Callable, until: float
) -> None:
    """Have all of a batch get ready, then time one after the other."""

    def tell(child: Child, what: str) -> None:
        with contextlib.suppress(Ended):  # which is heard, too
            child.say(what)

    def hear(one: tuple[Problem, Variant], child: Child) -> dict:
        try:
            return child.hear(GPU_SECONDS)
        except Ended as error:
            child.close()  # it may be at work still
            return {**first_row(*one), "reason": str(error)}

    for _, child in batch:
        tell(child, "get ready")
    ready = [(one, child, hear(one, child)) for one, child in batch]
    for one, child, row in ready:
        if "reason" not in row and len(batch) > 1 and time.monotonic() > until:
            row["reason"] = "no time was left"
        if "reason" not in row:
            tell(child, "go")
            row = hear(one, child)
        child.close()  # its memory is free before the next begins
        save(row)


def _on_gpu(
    connection: Connection,
    problem: Problem,
    variant: Variant,
    file: pathlib.Path,
    rounds: int,
    rates: Rates,
    beside: int,
) -> None:
    """Work of a child: says a variant's row so far, and where it may be timed, once it is told to,
    the whole.

    Args:
        beside: so many get ready at the same time, and share the CPU.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // beside))
    row, step = checked_step(problem, variant, "cuda", load_reference(file))
    connection.send(row)
    if step is None:
        return
    torch.cuda.empty_cache()  # what checking took is for those that get ready meanwhile
    connection.recv()
    torch.set_num_threads(threads)
    try:
        row |= _sampled(step, problem, rounds, rates, row)
    except Exception as error:  # a kernel's, a compiler's, memory's
        row["reason"] = first_line(error)
    connection.send(row)


def _sampled(step: Step, problem: Problem, rounds: int, rates: Rates, row: dict) -> dict:
    sample = Sampler(step, "cuda")
    with no_garbage_collection():
        for _ in range(WARM_UP):
            sample()
        timing = Timing.of([sample() for _ in range(rounds)])
        # Since before the step was made: a graph allocates when it is recorded, not when it runs.
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        count = max(rounds, int(2.0 / timing.median))  # two seconds, for the energy counter
        with Energy("cuda") as energy:
            for _ in range(count):
                step()
    joules = None if energy.joules is None else energy.joules / (count * problem.batch)
    return {
        **_figures(timing, problem, step.variant, rates, row),
        "peak_memory_bytes": peak,
        "reserved_memory_bytes": reserved,
        "joules_per_image": joules,
        "joules_from": energy.source,
    }


def _in_turn(
    problem: Problem, chosen: list[tuple[Variant, pathlib.Path]], rounds: int, rates: Rates
) -> Iterator[dict]:
    """On a CPU other work comes and goes: the variants take turns, and share what it costs."""
    with contextlib.ExitStack() as stack:
        ready: list[tuple[StepProcess, Variant, list[tuple[float, float]]]] = []
        lost: list[dict] = []

        def timed(one: tuple, count: int) -> list[tuple[float, int]]:
            """Of so many steps; of a process that died none, and the others go on without it."""
            try:
                return one[0](count)
            except Ended as error:
                ready.remove(one)
                lost.append({**one[0].row, "reason": str(error)})
                return []

        for variant, file in chosen:
            try:
                process = StepProcess(problem, variant, file)
            except Ended as error:
                yield {**first_row(problem, variant), "reason": str(error)}
                continue
            stack.enter_context(contextlib.closing(process))
            if "reason" in process.row:
                yield process.row
            else:
                ready.append((process, variant, []))
        for one in list(ready):
            timed(one, WARM_UP)
        order = random.Random(0)
        for _ in range(rounds):
            for one in order.sample(ready, len(ready)):
                time.sleep(PAUSE)
                if found := timed(one, TURN)[1:]:
                    taken, pages = zip(*found, strict=True)
                    one[2].append((statistics.mean(taken), statistics.mean(pages)))
        yield from lost
        seconds = {v.name: [taken for taken, _ in samples] for _, v, samples in ready}
        for process, variant, samples in ready:
            own, pages = seconds[variant.name], [pages for _, pages in samples]
            figures = _figures(Timing.of(own), problem, variant, rates, process.row)
            figures["page_faults"] = statistics.median(pages)
            if "naive" in seconds:
                figures["to_naive"] = spread_of_ratio(seconds["naive"], own)
            yield {**process.row, **figures, "peak_memory_bytes": None, "joules_per_image": None}


def spread_of_ratio(seconds: list[float], others: list[float]) -> dict[str, float]:
    """How much faster the others are, round by round: what slows a round slows both."""
    ratios = Timing.of([a / b for a, b in zip(seconds, others, strict=True)])
    return {"median": ratios.median, "p20": ratios.p20, "p80": ratios.p80}


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
    if variant.kind != "dense" and covers(problem.config):
        work = step_work(
            problem.config, problem.batch, problem.mask_ratio, row["parameters"], Widths(act=act)
        )
        product = rates.matrix_flops_per_second[str(DTYPES[problem.precision]).split(".")[1]]
        floor = floor_seconds(work, rates.copy_bytes_per_second, product)
        figures |= {"floor_ms": 1e3 * floor, "of_floor": floor / timing.median}
    return figures


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    # Nobody asks what a CPU would do: it is here.
    device = "cuda" if torch.cuda.is_available() or "--dry-run" in argv else "cpu"
    problems = CUDA_PROBLEMS if device == "cuda" else CPU_PROBLEMS
    known = {variant.name: variant for variant in variants(device)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", nargs="+", choices=[p.name for p in problems])
    parser.add_argument("--variant", nargs="+", choices=known, help="in this order")
    parser.add_argument("--others", action="store_true", help="all problems but the first")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of a CPU")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start nothing after these")
    parser.add_argument(
        "--at-once", action="store_true", help="compile all side by side; a GPU has to hold them"
    )
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--dry-run", action="store_true", help="say what a GPU would run")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    until = time.monotonic() + 60 * options.minutes
    chosen = [known[name] for name in options.variant or known]
    problems = problems[1:] if options.others else problems
    problems = [p for p in problems if not options.problem or p.name in options.problem]
    if options.dry_run:
        for problem in problems:
            print(problem.name, *(variant.name for variant in chosen), sep="; ")
        return 0
    rates = measure_rates(device, sorted({DTYPES[p.precision] for p in problems}, key=str))
    result = {
        "environment": describe(options.threads, device),
        "rates": dataclasses.asdict(rates),
        "rows": [],
    }
    file = folder_of(result["environment"]["device"]) / "steps.json"
    kept = earlier(file, result["environment"], of_any_commit=True)
    result["rows"] = rows_with_commits(kept)

    def save(row: dict) -> None:
        row |= {name: result["environment"][name] for name in ("commit", "dirty")}
        put(result["rows"], row, ("model", "variant"))
        speed = row.get("images_per_second")
        said = row.get("reason") if speed is None else (
            f"{speed:9.1f} images/s   {1e3 * row['seconds']:9.1f} ms"
            + (f"   floor {row['floor_ms']:.1f} ms" if row["floor_ms"] else "")
        )  # fmt: skip
        print(f"{row['model']:<20}{row['precision']:<6}{row['variant']:<30}{said}", flush=True)
        if not options.no_save:
            write_json(file, result)

    pairs = [[(problem, variant) for variant in chosen] for problem in problems]
    if options.at_once and device == "cuda":
        pairs = [sum(pairs, [])]
        # Otherwise each compiles with as many processes as there are cores, and threads that wait
        # for work would keep cores busy.
        share = max(1, (os.cpu_count() or 1) // len(pairs[0]))
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(share))
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for some in pairs:
        if time.monotonic() < until:
            measured_rows(some, device, options.rounds, rates, save, until, options.at_once)
    return 0


if __name__ == "__main__":
    sys.exit(main())
