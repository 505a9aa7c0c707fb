"""The operators and their peers, each checked against the fp64 reference before it is timed.

python -m pytest benchmarks                          # a selection for a CPU
python -m pytest benchmarks --selection default      # for a GPU, minutes
python -m pytest benchmarks -k "stages and naive"    # as with any tests
"""

from __future__ import annotations

import time

import pytest

from .measure import Timing, no_garbage_collection
from .operators import extra_bytes, timed_row
from .peers import Unable

SECONDS = 0.6  # for the samples of a row
LEAST = 5


def test_operator(benchmark, entry, results) -> None:
    if time.monotonic() > results.end:
        results.add(entry.row() | {"checked": False, "reason": "no time was left"})
        pytest.skip("no time left")
    bench = results.bench(entry.problem)
    row = bench.row(entry.peer, entry.which)
    try:
        prepared = bench.prepare(entry.peer, entry.which)
    except Unable as reason:
        results.add(row | {"checked": False, "reason": str(reason)})
        pytest.skip(str(reason))
    except AssertionError as error:  # ours
        results.add(row | {"checked": False, "reason": f"wrong, not timed: {error}"[:200]})
        raise
    sampler, samples = prepared.sampler, []
    start = time.perf_counter()
    sampler()
    rounds = max(LEAST, min(results.rounds, int(SECONDS / (time.perf_counter() - start))))
    benchmark.group = f"{entry.problem} {entry.which}"
    with no_garbage_collection():
        benchmark.pedantic(
            # Our own clock (events on a GPU) counts; pytest-benchmark's is for its table.
            lambda: samples.append(sampler.run()),
            setup=sampler.set_up,
            rounds=rounds,
            warmup_rounds=2,
        )
    row |= {"checked": True}
    if entry.which == "both":
        row["extra_bytes"] = extra_bytes(bench, entry.peer)
    results.add(timed_row(row, Timing.of(samples[2:]), prepared, results.rates, bench))
