"""Fill the compilers' caches on all cores, before what is compiled is timed one after the other.

    python -m benchmarks.warm table    # what `--selection table` of the operators compiles
    python -m benchmarks.warm rest     # what `--selection rest` does
    python -m benchmarks.warm tune     # the candidates of benchmarks.tune for Swin's classes, and
                                       # the other classes as they are, which benchmarks.choose runs

Each entry runs once, as it will be run: the caches' keys (source, constants, what the launcher
finds in the arguments, options, versions) are then those that are asked for later.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed

from . import tune
from .cases import OURS, select
from .environment import first_line
from .operators import Bench

SPARE = 4  # cores left to a build that runs meanwhile


def jobs_of_operators(selection: str) -> list[tuple]:
    """Problem and peer of whatever waits for a compiler, the slowest first."""
    found = [
        (number, peer.name, peer.compiles)
        for number, problem in enumerate(select(selection, "cuda"))
        for peer in problem.peers
        if peer.compiles or peer.backend == "triton"
    ]
    return [job[:2] for job in sorted(found, key=lambda job: not job[2])]


def run_of_operators(selection: str, number: int, name: str) -> None:
    problem = select(selection, "cuda")[number]
    peer = next(peer for peer in problem.peers if peer.name == name)
    try:
        Bench(problem, "cuda").run_once(peer)
    except Exception as error:
        if peer.name in OURS:
            raise
        print(f"{name}: {first_line(error)}")  # the table will say so, too


def jobs_of_tune() -> list[tuple]:
    """A class and the numbers of candidates that share what is compiled: no two processes compile
    the same."""
    found = []
    for name in tune.ordered(tune.table()):
        groups: dict[tuple, tuple] = {}
        for number, one in enumerate(tune.candidates(name)):
            key = (one.warps, one.stages, one.block)
            groups[key] = (*groups.get(key, ()), number)
        searched = name.endswith("-32-16bit")
        found += [(name, *numbers) for numbers in (groups.values() if searched else [(0,)])]
    return found


@functools.lru_cache(maxsize=1)
def _problem(name: str):
    return tune.problem_of(name, 128)


def run_of_tune(name: str, *numbers: int) -> None:
    table = tune.table()
    shipped, candidates = table[name], tune.candidates(name)
    run = tune.runner(name, _problem(name))
    try:
        for number in numbers:
            table[name] = candidates[number]
            run()
    finally:
        table[name] = shipped


WHAT = {
    "tune": (jobs_of_tune, run_of_tune),
    **{
        name: (
            functools.partial(jobs_of_operators, name),
            functools.partial(run_of_operators, name),
        )
        for name in ("table", "rest")
    },
}


def run_all(work: Callable, jobs: list[tuple], processes: int) -> dict[tuple, str]:
    """Run work(*job) of all jobs; why some failed."""
    failed = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = {pool.submit(work, *job): job for job in jobs}
        for future in as_completed(futures):
            if error := future.exception():
                failed[futures[future]] = first_line(error)
    return failed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--dry-run", action="store_true", help="run nothing")
    options = parser.parse_args(argv)
    list_jobs, work = WHAT[options.what]
    jobs = list_jobs()
    if options.dry_run:
        for job in jobs:
            print(*job)
        return 0
    # The processes are as many as the cores: none starts others of its own.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    start = time.monotonic()
    processes = max(1, min(len(jobs), len(os.sched_getaffinity(0)) - SPARE))
    failed = run_all(work, jobs, processes)
    for job, reason in failed.items():
        print(*job, reason, sep="  ")
    taken = time.monotonic() - start
    print(f"{len(jobs) - len(failed)} of {len(jobs)} compiled in {taken:.0f} s")
    # A candidate that does not fit is no failure: the search leaves it out as well.
    return int(bool(failed) and options.what != "tune")


if __name__ == "__main__":
    sys.exit(main())
