"""A variant's step, checked, in a process of its own.

What a step costs depends on what its process did before: on a CPU on the heap and the settings of
the C library, on a GPU on what torch.compile has seen and what lies in memory; and a kernel that
fails may leave no GPU to the process. So each variant has the process that a user's run would be.
On a CPU they take turns.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pathlib
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from greenmim_kernels.host_memory import keep_freed_memory

from .environment import first_line
from .measure import Sampler, no_garbage_collection
from .step_variants import Errors, Expected, Problem, Step, Variant, reference

# How far a step may be from the reference in float32: about four times what the naive path is off
# (Swin-B, batch 2: loss 1e-5, gradients 0.0055 and 0.019 in bf16, 3e-7 and 1.3e-6 in fp32).
TOLERANCE = {
    "fp32": Errors(1e-5, 1e-4, 1e-4),
    "bf16": Errors(1e-3, 0.02, 0.08),
    "fp16": Errors(1e-3, 0.005, 0.02),
}
# SimMIM's loss has a sign as its gradient, which rounding turns where a pixel is nearly right: in
# bf16 it is off by 0.027 and 0.079.
DENSE_TOLERANCE = {**TOLERANCE, **dict.fromkeys(("bf16", "fp16"), Errors(1e-3, 0.1, 0.3))}


def checked_step(
    problem: Problem, variant: Variant, device: str, expected: Expected
) -> tuple[dict, Step | None]:
    """A variant's row so far, and its step where it may be timed: else the row has the reason."""
    row = first_row(problem, variant)
    try:
        start = time.perf_counter()
        step = Step(problem, variant, device)
        errors = step.errors(expected)
        row["first_seconds"] = time.perf_counter() - start
    except Exception as error:  # out of memory, a compiler's own, a backend that cannot
        row["reason"] = first_line(error)
        return row, None
    row["parameters"] = step.parameters
    row["errors"] = errors._asdict()
    allowed = (DENSE_TOLERANCE if variant.kind == "dense" else TOLERANCE)[problem.precision]
    if not all(error <= most for error, most in zip(errors, allowed, strict=True)):
        said = ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
        row["reason"] = f"wrong, not timed: off from the reference by {said}"
        return row, None
    row["checked"] = True
    return row, step


def first_row(problem: Problem, variant: Variant) -> dict:
    return {
        "model": problem.name,
        "batch": problem.batch,
        "precision": problem.precision,
        "variant": variant.name,
        "checked": False,
    }


class Ended(Exception):
    """A process ended, or took too long, before it said what was asked."""


class Child:
    """A process that runs `work(connection, *arguments)`, with what is said both ways."""

    def __init__(self, work: Callable, *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()  # else its end is not seen here

    def hear(self, seconds: float | None = None) -> Any:
        """The next thing it says.

        Raises:
            Ended: it says nothing any more, or not within the seconds.
        """
        try:
            if self.connection.poll(seconds):
                return self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            raise Ended(
                f"its process ended with exit code {self.process.exitcode}; what it wrote stands"
                " above"
            ) from None
        raise Ended(f"it took longer than {seconds:.0f} s")

    def say(self, what: object) -> None:
        """Raises Ended where nobody hears."""
        try:
            self.connection.send(what)
        except ConnectionError:
            self.hear()

    def close(self) -> None:
        """End the process: it ends when it has no one to talk to, or is ended."""
        self.connection.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def in_child(work: Callable, *arguments: object, seconds: float | None = None) -> Any:
    """What `work(connection, *arguments)` says in a process of its own; raises Ended."""
    with contextlib.closing(Child(work, *arguments)) as child:
        return child.hear(seconds)


def when_told(connection: Connection, work: Callable, *arguments: object) -> None:
    """Work of a child: what `work` does, once anything is said to it."""
    with contextlib.suppress(EOFError):
        connection.recv()
        work(connection, *arguments)


def save_reference(
    connection: Connection, problem: Problem, dense: bool, device: str, file: pathlib.Path
) -> None:
    """Work of a child: write what is expected to a file; says None, or why there is nothing."""
    try:
        torch.save(reference(problem, dense, device)._asdict(), file)
        connection.send(None)
    except RuntimeError as error:  # out of memory
        connection.send(first_line(error))


def load_reference(file: pathlib.Path) -> Expected:
    return Expected(**torch.load(file))


class StepProcess:
    """A process with a variant's step on the CPU.

    Attributes:
        row: what `checked_step` gives; a reason in it says that there is no step to time.
    """

    def __init__(self, problem: Problem, variant: Variant, expected: pathlib.Path) -> None:
        self._child = Child(_serve, problem, variant, expected, torch.get_num_threads())
        try:
            self.row: dict = self._child.hear()
        except Ended:
            self._child.close()
            raise

    def __call__(self, steps: int = 1) -> list[tuple[float, int]]:
        """Of so many steps: seconds, and pages of memory that the system gave meanwhile."""
        self._child.say(steps)
        return self._child.hear()

    def close(self) -> None:
        """End the process."""
        self._child.close()


def _serve(
    connection: Connection, problem: Problem, variant: Variant, file: pathlib.Path, threads: int
) -> None:
    torch.set_num_threads(threads)
    if variant.keeps_memory:
        keep_freed_memory()
    row, step = checked_step(problem, variant, "cpu", load_reference(file))
    connection.send(row)
    if step is None:
        return
    sample = Sampler(step)

    def one() -> tuple[float, int]:
        pages = _pages()
        return sample(), _pages() - pages

    with no_garbage_collection():
        while True:
            try:
                steps = connection.recv()
            except EOFError:
                return
            connection.send([one() for _ in range(steps)])


def _pages() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
