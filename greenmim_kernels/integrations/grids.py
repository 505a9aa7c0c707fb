"""Partitions of whole grids, cut into windows as libraries cut them: rolled, padded, shifted."""

from __future__ import annotations

import functools
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .._ops import add_op_namespace_prefix
from ..partition import GroupPartition, table_rows
from ..windows import partition_from_windows

# What is kept of partitions: in image restoration one may have megabytes, and images any size.
# The fewest are those of a network's stages, shifted and not: it asks for one after the other.
FEWEST, MOST, LARGEST_BYTES = 8, 256, 128 << 20


def _kept_within_limits(make: Callable) -> Any:
    """A cache of what was asked for last."""
    kept: OrderedDict[tuple, Any] = OrderedDict()
    lock = threading.Lock()

    def get(*key):
        with lock:
            if key in kept:
                kept.move_to_end(key)
                return kept[key]
        made = make(*key)
        with lock:
            kept[key] = made
            while len(kept) > MOST or (
                len(kept) > FEWEST and sum(x.nbytes for x in kept.values()) > LARGEST_BYTES
            ):
                kept.popitem(last=False)
        return made

    get.kept = kept  # type: ignore[attr-defined]
    return get


@dataclass(frozen=True, eq=False, repr=False)
class GridPartition(GroupPartition):
    """A partition of a dense grid.

    Attributes:
        pads: whether the window does not divide the grid, so that padding attends.
    """

    pads: bool


def grid_partition(
    grid: Sequence[int],
    window: Sequence[int],
    shift: Sequence[int],
    table_window: Sequence[int],
    device: torch.device,
    *,
    pads_first: bool = False,
) -> GridPartition:
    """The windows of a dense grid, for every image of a batch; made once per geometry and device.

    Where the window does not divide the grid, padding fills it up at its end and attends. A slot
    has the place in the bias table that it has when counted through `table_window`.

    Args:
        grid: tokens per axis; tokens are numbered row-major.
        window: its sides; may be less than those of the bias table.
        shift: by how much the grid is rolled back, per axis.
        table_window: the window that the bias table is for.
        device: where the partition is wanted.
        pads_first: whether the grid is padded before it is rolled, or after.
    """
    # Sizes may be symbolic while tracing; they become constants of the trace.
    grid, window, shift, table_window = (
        tuple([index(x) for x in axes]) for axes in (grid, window, shift, table_window)
    )
    key = (grid, window, shift, table_window, pads_first, device)
    in_a_graph = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    rows = (_as_operator if in_a_graph else _kept_as_long_as_needed)(*key)
    num_tokens, slots = math.prod(grid), math.prod(window)
    pads = any([side % of_window for side, of_window in zip(grid, window, strict=True)])
    token_index, window_id, query_row, key_row = rows.unbind(0)
    return GridPartition(
        token_index, window_id, query_row, key_row,
        num_tokens, table_rows(table_window), table_window, slots, pads,
    )  # fmt: skip


# As an operator a graph calls it, and a mode with tensors of its own sees it.
@torch.library.custom_op(add_op_namespace_prefix("grid_partition"), mutates_args=())
def _as_operator(
    grid: Sequence[int],
    window: Sequence[int],
    shift: Sequence[int],
    table_window: Sequence[int],
    pads_first: bool,
    device: torch.device,
) -> Tensor:
    sizes = (tuple(x) for x in (grid, window, shift, table_window))
    # A compiler may use the memory of what it got for something else.
    return _kept_as_long_as_needed(*sizes, pads_first, device).clone()


@_as_operator.register_fake
def _(grid, window, shift, table_window, pads_first, device) -> Tensor:
    sizes = (tuple(x) for x in (grid, window, shift, table_window))
    shape = _arrays(*sizes, pads_first).shape
    return torch.empty(shape, dtype=torch.int32, device=device)


def _kept_as_long_as_needed(*key) -> Tensor:
    return (_lasting if is_capturing(key[-1]) else _kept)(*key)


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is made: what it has read must not be given back."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.cache
def _lasting(*key) -> Tensor:
    return _kept(*key)


@_kept_within_limits
def _kept(*key) -> Tensor:
    *geometry, device = key
    # Autograd refuses to save tensors made in inference mode.
    with torch.inference_mode(False):
        return torch.from_numpy(_arrays(*geometry)).to(device)


@_kept_within_limits
def _arrays(
    grid: tuple[int, ...],
    window: tuple[int, ...],
    shift: tuple[int, ...],
    table_window: tuple[int, ...],
    pads_first: bool,
) -> np.ndarray:
    """A partition's tensors, int32 [4, 1, G, S]."""
    token, segment = cut(grid, window, shift, pads_first)
    with torch.inference_mode(False), _disable_current_modes():
        part = partition_from_windows(
            token, table_window, segment=segment, pad=bool((token < 0).any())
        )
        return torch.stack(part.tensors).numpy()


def cut(
    grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], pads_first: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens in windows, [windows, slots], -1 in padding; and what part of the grid they are of.

    Where a rolled grid comes round its other end begins another part.
    """
    padding = [(0, -side % of_window) for side, of_window in zip(grid, window, strict=True)]
    token = np.arange(math.prod(grid)).reshape(grid)
    if pads_first:
        token = np.pad(token, padding, constant_values=-1)
    token = np.roll(token, [-by for by in shift], range(len(grid)))
    if not pads_first:
        token = np.pad(token, padding, constant_values=-1)
    part = np.zeros((), np.int64)
    sides: tuple[int, ...] = token.shape
    for place, side, by in zip(np.indices(sides), sides, shift, strict=True):
        part = 2 * part + (place >= side - by)
    return _windows(token, window), _windows(part, window)


def _windows(x: np.ndarray, window: tuple[int, ...]) -> np.ndarray:
    """A padded grid -> [windows, slots]."""
    sizes = [
        n
        for side, of_window in zip(x.shape, window, strict=True)
        for n in (side // of_window, of_window)
    ]
    axes = [*range(0, len(sizes), 2), *range(1, len(sizes), 2)]
    return x.reshape(sizes).transpose(axes).reshape(-1, math.prod(window))
