"""Which of a GPU's two backends "auto" takes: one table, by class of problem.

The table is `automatic_table.json`, which `python -m benchmarks.choose` writes on a GPU: for every
class the faster backend and how the two compared. A class is "<operator>-<length>-<head dim>-
<precision>" for attention, with length "short" for groups that one tile holds and "long" for
others, and the operator's name for what is no attention.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib

import torch

TABLE = pathlib.Path(__file__).parent / "automatic_table.json"
SHORT_GROUP = 64
HEAD_DIMS = (16, 32, 64)
# Operators of which all problems are one class.
SINGLE = ("group_gather", "group_scatter", "sparse_depthwise_conv")


@dataclasses.dataclass(frozen=True)
class Choice:
    """A backend, "cuda" or "triton", and why, in a few words."""

    backend: str
    reason: str


@functools.cache
def table() -> dict:
    """The shipped table, read once: {"device": name or None, "classes": {class: row}}."""
    return json.loads(TABLE.read_text())


def class_name(
    operator: str, dtype: torch.dtype, head_dim: int | None, group_size: int | None
) -> str:
    """The class of a problem; an attention without sizes is that of Swin: head dim 32, short."""
    if operator in SINGLE:
        return operator
    length = "long" if group_size is not None and group_size > SHORT_GROUP else "short"
    precision = "fp32" if dtype == torch.float32 else "16bit"
    # Compared, not printed: under torch.compile a size may be symbolic.
    known = 32 if head_dim is None else next((n for n in HEAD_DIMS if n >= head_dim), 32)
    return f"attention-{length}-{known}-{precision}"


def choice(
    operator: str, dtype: torch.dtype, head_dim: int | None = None, group_size: int | None = None
) -> Choice:
    """What the table says of a problem; a class it does not know is taken as not measured."""
    return _choice(class_name(operator, dtype, head_dim, group_size))


def choices() -> dict[str, Choice]:
    """Every class that the table tells apart, with its choice."""
    names = [
        f"attention-{length}-{head_dim}-{precision}"
        for length in ("short", "long")
        for head_dim in HEAD_DIMS
        for precision in ("16bit", "fp32")
    ]
    return {name: _choice(name) for name in (*SINGLE, *names)}


# Dynamo takes the answer as a constant of the trace and does not look inside.
@torch.compiler.assume_constant_result
def _choice(name: str) -> Choice:
    row = table()["classes"].get(name)
    if row is None:
        return Choice("cuda", "not measured; compiled ahead, so that no step waits for a compiler")
    backend = row["backend"]
    other = "triton" if backend == "cuda" else "cuda"
    ratio = row[f"{backend}_ms"] / row[f"{other}_ms"]
    return Choice(backend, f"{backend} takes {ratio:.2f} of {other}'s time on {table()['device']}")
