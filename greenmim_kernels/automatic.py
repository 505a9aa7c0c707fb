"""Which of the two GPU backends "auto" takes: one table, by class of problem.

`python -m benchmarks.choose` writes the table, `automatic_table.json`, on a GPU: the faster backend
and both times in ms, for each class that was measured. Attention is in the class
"attention-<length>-<head dim>-<precision>": length is "short" for groups that fit one tile, else
"long"; precision is "16bit" or "fp32". Every other operator is a class of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib

import torch

from .partition import LARGEST_SHORT_GROUP

TABLE = pathlib.Path(__file__).parent / "automatic_table.json"
HEAD_DIMS = (16, 32, 64)
# Each of these operators is one class, whatever the sizes.
SINGLE_CLASS = ("group_gather", "group_scatter", "sparse_depthwise_conv")


@dataclasses.dataclass(frozen=True)
class Choice:
    """A backend, "cuda" or "triton", and the reason for it."""

    backend: str
    reason: str


@functools.cache
def table() -> dict:
    """The shipped table, read once: {"device": name or None, "classes": {class: row}}."""
    return json.loads(TABLE.read_text())


def class_name(
    operator: str, dtype: torch.dtype, head_dim: int | None, group_size: int | None
) -> str:
    """The class of a problem; attention without sizes counts as Swin's: head dim 32, short."""
    if operator in SINGLE_CLASS:
        return operator
    length = "long" if group_size is not None and group_size > LARGEST_SHORT_GROUP else "short"
    precision = "fp32" if dtype == torch.float32 else "16bit"
    # Compared, not printed: under torch.compile a size may be symbolic. (No GPU backend runs head
    # dims above the last one.)
    known = 32 if head_dim is None else next((n for n in HEAD_DIMS if n >= head_dim), HEAD_DIMS[-1])
    return f"attention-{length}-{known}-{precision}"


def choice(
    operator: str, dtype: torch.dtype, head_dim: int | None = None, group_size: int | None = None
) -> Choice:
    """The table's choice for a problem; "cuda" for a class that was not measured."""
    return _choice(class_name(operator, dtype, head_dim, group_size))


def choices() -> dict[str, Choice]:
    """Every class of problem, measured or not, with its choice."""
    names = [
        f"attention-{length}-{head_dim}-{precision}"
        for length in ("short", "long")
        for head_dim in HEAD_DIMS
        for precision in ("16bit", "fp32")
    ]
    return {name: _choice(name) for name in (*SINGLE_CLASS, *names)}


# Dynamo keeps the answer as a constant of the trace and does not look inside.
@torch.compiler.assume_constant_result
def _choice(name: str) -> Choice:
    row = table()["classes"].get(name)
    if row is None:
        return Choice("cuda", "not measured; compiled ahead, so that no step waits for a compiler")
    backend = row["backend"]
    other = "triton" if backend == "cuda" else "cuda"
    ratio = row[f"{backend}_ms"] / row[f"{other}_ms"]
    return Choice(backend, f"{backend} takes {ratio:.2f} of {other}'s time on {table()['device']}")
