"""A variant's step, checked; on a CPU in a process of its own.

What a step costs on a CPU depends on what its process did before: on the heap and on the settings
of the C library. So each variant has the process that a user's run would be, and they take turns.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from greenmim_kernels.host_memory import keep_freed_memory

from .measure import Sampler, no_garbage_collection
from .step_variants import Problem, Step, Variant

# How far a loss, and the gradient of the first block, may be from the reference's in float32,
# relative. What is wrong in the network changes its gradient, even where the loss of fresh weights
# hardly depends on it.
TOLERANCE = {"fp32": (1e-5, 1e-3), "bf16": (1e-2, 0.1), "fp16": (2e-3, 0.02)}


def checked_step(
    problem: Problem, variant: Variant, device: str, expected: tuple[float, Tensor]
) -> tuple[dict, Step | None]:
    """A variant's row so far, and its step where it may be timed: else the row has the reason.

    `expected` is what `step_variants.reference` gives.
    """
    row = first_row(problem, variant)
    try:
        start = time.perf_counter()
        step = Step(problem, variant, device)
        errors = step.errors(expected)
        row["first_seconds"] = time.perf_counter() - start
    except (RuntimeError, ValueError) as error:  # out of memory, or a backend that cannot
        row["reason"] = first_line(error)
        return row, None
    row["parameters"] = step.parameters
    row["loss_error"], row["gradient_error"] = errors or (None, None)
    allowed = TOLERANCE[problem.precision]
    if errors and not all(e <= a for e, a in zip(errors, allowed, strict=True)):
        row["reason"] = (
            f"wrong, not timed: its loss is off by {errors[0]:.1e} of the reference's, its"
            f" gradient by {errors[1]:.1e}"
        )
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


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class StepProcess:
    """A process with a variant's step on the CPU.

    Attributes:
        row: what `checked_step` gives; a reason in it says that there is no step to time.
    """

    def __init__(self, problem: Problem, variant: Variant, expected: tuple[float, Tensor]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, problem, variant, expected, torch.get_num_threads())
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()  # else its end is not seen here
        self._name = variant.name
        self.row: dict = self._talk(self._connection.recv)

    def __call__(self) -> tuple[float, int]:
        """Seconds of one step, and pages of memory that the system gave meanwhile."""
        self._talk(lambda: self._connection.send(None))
        return self._talk(self._connection.recv)

    def _talk(self, how: Callable[[], Any]) -> Any:
        try:
            return how()
        except (EOFError, ConnectionError):
            self.close()
            raise RuntimeError(
                f"the process of variant {self._name!r} ended with exit code"
                f" {self._process.exitcode}; what it wrote stands above"
            ) from None

    def close(self) -> None:
        """End the process, which ends when it has no one to talk to."""
        self._connection.close()
        self._process.join()


def _serve(
    connection: Connection,
    problem: Problem,
    variant: Variant,
    expected: tuple[float, Tensor],
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    if variant.keeps_memory:
        keep_freed_memory()
    row, step = checked_step(problem, variant, "cpu", expected)
    connection.send(row)
    if step is None:
        return
    sample = Sampler(step)
    with no_garbage_collection():
        while True:
            try:
                connection.recv()
            except EOFError:
                return
            pages = _pages()
            connection.send((sample(), _pages() - pages))


def _pages() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
