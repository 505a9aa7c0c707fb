"""What a race would show in: the same bits again and again, and fresh random problems.

    python -m tests.kernels.stress --backend triton --seconds 20 --out stress.json

Everything runs in several processes at once and beside other work on a stream of its own, so that
no run has the timing of the one before. The rows so far are written whole after each.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import multiprocessing
import pathlib
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed

import numpy as np
import torch
from torch import Tensor

import greenmim_kernels as gk
from benchmarks.environment import describe, first_line, folder_of, write_json
from greenmim_kernels.backends import triton_interprets
from greenmim_kernels.testing import Case, Inputs, assert_within_budget, make_inputs, run

from .budget import plain_results

if triton_interprets():
    from .interpreter import repair

    repair()

REPEATS = 100
HEADS = {32: 4, 64: 2, 16: 8}  # of 128 channels, by head dim
CLASSES = [
    Case(window_size=window, head_dim=head_dim, num_heads=heads, batch=32, shifted=True,
         per_image=per_image, capacity=True, dtype=torch.bfloat16)
    for per_image in (False, True)
    for head_dim, heads in HEADS.items()
    for window in (7, 14)
    if head_dim == 32 or not per_image
]  # fmt: skip
SMALL = [Case(image_size=(64, 96), stage=2, window_size=4, num_heads=1, capacity=True)]
Run = Callable[[Inputs], dict[str, Tensor]]


def check(inputs: Inputs, results: dict[str, Tensor], others: Callable[[], Iterable[Inputs]]):
    """Hold results to the error budget; `others` draws the same problem on other values.

    Raises:
        AssertionError: they are off by more.
    """
    # Groups that one tile does not hold take delta from the rounded output.
    saved_output = inputs.part.group_size > 64 or inputs.qkv.shape[-1] > 96 * inputs.num_heads

    def measure(given: Inputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        with gk.use_backend("reference"):
            exact = run(given.to(torch.float64))
        return plain_results(given, saved_output), exact

    assert_within_budget(
        results, *measure(inputs), other_draws=lambda: (measure(other) for other in others())
    )


def draws(case: Case, device: str) -> Iterable[Inputs]:
    return (make_inputs(case, seed, device) for seed in range(1, 5))


@functools.cache
def _noise() -> tuple[torch.cuda.Stream, Tensor]:
    return torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)


def disturb(device: str, number: int) -> None:
    """Give a GPU other work meanwhile, another amount each time."""
    if device == "cuda":
        stream, noise = _noise()
        with torch.cuda.stream(stream):
            noise[: 256 * (1 + number % 8)] @ noise


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def same_bits(case: Case, backend: str, device: str, repeats: int, run: Run = run) -> int:
    """Run a case so many times, with two inputs in turn, so that a read that comes too early finds
    the other's values; the first run's results are right, and no other's differ.

    Raises:
        AssertionError: names what differed, in how many runs.
    """
    both = [make_inputs(case, seed, device) for seed in (0, 5)]
    with gk.use_backend(backend):
        first = [run(inputs) for inputs in both]
        # Counted on the device, which is never waited for.
        counts = {name: torch.zeros((), dtype=torch.int64, device=device) for name in first[0]}
        for number in range(repeats):
            disturb(device, number)
            for name, value in run(both[number % 2]).items():
                counts[name] += (bits(value) != bits(first[number % 2][name])).any()
    differ = {name: int(count) for name, count in counts.items() if count}
    assert not differ, f"{case}: of {repeats} runs so many differ from the first: {differ}"
    check(both[0], first[0], lambda: draws(case, device))
    return repeats


def random_case(rng: np.random.Generator, head_dim: int) -> Case:
    """A problem of the kernels of `CLASSES`: other constants would be compiled for seconds."""
    choose = lambda *values: values[rng.integers(len(values))]  # noqa: E731
    return dataclasses.replace(
        choose(*(case for case in CLASSES if case.head_dim == head_dim)),
        # Grids that are no smaller than a window of 14, and more than 64 tokens.
        image_size=tuple(32 * int(units) for units in rng.integers(5, 9, 2)),
        stage=choose(1, 2),
        batch=int(rng.integers(1, 33)),
        shifted=bool(rng.integers(2)),
        mask_ratio=choose(0.5, 0.6, 0.75),
    )


def fresh_problems(
    seed: int,
    backend: str,
    device: str,
    until: float,
    run: Run = run,
    draw: Callable[[np.random.Generator, int], Case] = random_case,
) -> int:
    """Hold random problems to the error budget until so late on the monotonic clock, where one
    more would not be done; how many.

    Raises:
        AssertionError: names the problem.
    """
    rng, count, longest = np.random.default_rng(seed), 0, 0.0
    head_dim = tuple(HEADS)[seed % len(HEADS)]
    while not count or time.monotonic() + longest < until:
        start = time.monotonic()
        case, values = draw(rng, head_dim), int(rng.integers(1 << 31))
        inputs = make_inputs(case, values, device)
        disturb(device, count)
        with gk.use_backend(backend):
            results = run(inputs)
        try:
            check(inputs, results, lambda case=case: draws(case, device))
        except AssertionError as error:
            raise AssertionError(f"{case}, values {values}: {error}") from None
        count += 1
        longest = max(longest, time.monotonic() - start)
    return count


def small_case(rng: np.random.Generator, head_dim: int) -> Case:
    """For the interpreter, which takes seconds for more."""
    return Case(image_size=(64, 64), stage=3, window_size=2, num_heads=1, head_dim=head_dim,
                shifted=bool(rng.integers(2)), capacity=bool(rng.integers(2)))  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=20, help="all together")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--small", action="store_true", help="small problems, for a CPU")
    parser.add_argument("--out", type=pathlib.Path, help="file of the rows")
    parser.add_argument("--dry-run", action="store_true", help="run nothing")
    options = parser.parse_args(argv)
    until = time.monotonic() + options.seconds
    classes, draw = (SMALL, small_case) if options.small else (CLASSES, random_case)
    if options.dry_run:
        print(*classes, sep="\n")
        return 0
    file = options.out
    if file is None and options.device == "cuda":
        file = folder_of(torch.cuda.get_device_name()) / f"stress-{options.backend}.json"
    environment = describe(torch.get_num_threads(), options.device)
    common = options.backend, options.device
    rows: list[dict] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=context) as pool:
        what: dict[Future, str] = {
            pool.submit(same_bits, case, *common, options.repeats): f"the same bits, {case}"
            for case in classes
        }
        for seed in range(options.processes):
            future = pool.submit(fresh_problems, seed, *common, until, draw=draw)
            what[future] = f"fresh problems, seed {seed}"
        for future in as_completed(what):
            row = {"what": what[future], "passed": future.exception() is None}
            error = future.exception()
            row |= {"reason": first_line(error)} if error else {"runs": future.result()}
            print(row, flush=True)
            rows.append(row)
            if file:
                write_json(file, {"environment": environment, "rows": rows})
    return int(not all(row["passed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
