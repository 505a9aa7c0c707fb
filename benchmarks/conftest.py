"""Options of the operator benchmarks, and the file that their rows go to.

pytest-benchmark runs and prints them; the rows, with what it does not know (limits, checks,
reasons), are written to benchmarks/results/<device>/operators.json after every one, whole, beside
what it has of other selections from the same place.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time

import pytest
import torch

from greenmim_kernels.host_memory import keep_freed_memory

from .cases import SELECTIONS, Problem, select
from .environment import describe, earlier, folder_of, put, rows_with_commits, write_json
from .measure import Rates, measure_rates
from .operators import Bench
from .peers import Peer

ROW = ("study", "operator", "model", "case", "peer", "pass")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("greenmim benchmarks")
    group.addoption("--selection", choices=SELECTIONS, default="short")
    group.addoption("--batch", type=int, help="images; 8 on a CPU and 128 on a GPU")
    group.addoption("--threads", type=int, help="of the CPU")
    group.addoption("--rounds", type=int, default=15, help="samples of a row")
    group.addoption("--minutes", type=float, default=1e9, help="measure nothing after these")
    group.addoption("--anew", action="store_true", help="drop what the file has of other rows")
    group.addoption(
        "--out", type=pathlib.Path, help="file of the rows; 'none' writes nothing, as tiny does"
    )


def device() -> str:
    """Where everything is measured."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row to be: a peer's pass on a problem."""

    problem: Problem
    peer: Peer
    which: str

    def row(self) -> dict:
        """What is known without inputs, which take their time: by what rows are told apart."""
        one = self.problem
        values = (one.study, one.operator, one.model, str(one.case), self.peer.name, self.which)
        return dict(zip(ROW, values, strict=True))

    def __str__(self) -> str:
        return f"{self.problem}-{self.peer.name}-{self.which}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "entry" in metafunc.fixturenames:
        options = metafunc.config.option
        entries = [
            Entry(problem, peer, which)
            for problem in select(options.selection, device(), options.batch)
            for peer in problem.peers
            for which in problem.passes
        ]
        metafunc.parametrize("entry", entries, ids=str)


class Results:
    """The rows of a run and the file they are in."""

    def __init__(self, config: pytest.Config) -> None:
        options = config.option
        if options.threads:
            torch.set_num_threads(options.threads)
        keep_freed_memory()
        self.end = time.monotonic() + 60 * options.minutes
        self.rounds = options.rounds
        environment = describe(torch.get_num_threads(), device())
        dtypes = [torch.float32, torch.bfloat16]
        dtypes += [torch.float16] if device() == "cuda" else []
        scale = 0.1 if options.selection == "tiny" else 1.0
        self.rates: Rates = measure_rates(device(), dtypes, scale)
        usual = folder_of(environment["device"]) / "operators.json"
        if options.selection == "tiny":  # sizes that say nothing
            usual = pathlib.Path("none")
        self.file = options.out or usual
        kept = {} if options.anew else earlier(self.file, environment, of_any_commit=True)
        self.content = {
            "environment": environment,
            "selection": kept.get("selection", options.selection),
            "rates": dataclasses.asdict(self.rates),
            "rows": rows_with_commits(kept),
        }
        self._bench: Bench | None = None

    def bench(self, problem: Problem) -> Bench:
        """A problem's inputs; those of the problem before are given back."""
        if self._bench is None or self._bench.problem is not problem:
            if self._bench is not None:
                self._bench.close()
            self._bench = Bench(problem, device())
        return self._bench

    def add(self, row: dict) -> None:
        """Keep a row."""
        put(self.content["rows"], row, ROW)
        if str(self.file) != "none":
            write_json(self.file, self.content)


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Results:
    return Results(request.config)
