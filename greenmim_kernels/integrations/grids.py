"""Partitions of dense grids, which libraries pad, roll and cut into windows."""

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

# Limits of the caches of partitions. In image restoration images have any size and a partition may
# take megabytes. A network cycles through those of its stages, shifted and not: never keep fewer.
MIN_KEPT, MAX_KEPT, MAX_BYTES = 8, 256, 128 << 20


def _cached(make: Callable) -> Any:
    """A cache of `make` that drops the least recently used results beyond the limits above."""
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
            while len(kept) > MAX_KEPT or (
                len(kept) > MIN_KEPT and sum(x.nbytes for x in kept.values()) > MAX_BYTES
            ):
                kept.popitem(last=False)
        return made

    get.kept = kept  # type: ignore[attr-defined]
    return get


@dataclass(frozen=True, eq=False, repr=False)
class GridPartition(GroupPartition):
    """A partition of a dense grid.

    Attributes:
        pads: whether padding attends, as the window does not divide the grid.
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

    Where the window does not divide the grid, padding at the end of each axis completes it, and
    attends. Slot i has the bias of place i of `table_window`, row-major, whatever its own window.

    Args:
        grid: tokens per axis; tokens are numbered row-major.
        window: slots per axis; may have fewer than `table_window`.
        shift: tokens by which each axis is rolled back.
        table_window: the window that the bias table is for.
        device: the device of the partition.
        pads_first: whether the grid is padded before it is rolled, or after.
    """
    # Sizes may be symbolic while tracing; they become constants of the trace.
    grid, window, shift, table_window = (
        tuple([index(x) for x in axes]) for axes in (grid, window, shift, table_window)
    )
    key = (grid, window, shift, table_window, pads_first, device)
    in_a_graph = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    tensors = (_operator if in_a_graph else _tensors)(*key)
    num_tokens, slots = math.prod(grid), math.prod(window)
    pads = any([size % side for size, side in zip(grid, window, strict=True)])
    token_index, window_id, query_row, key_row = tensors.unbind(0)
    return GridPartition(
        token_index, window_id, query_row, key_row,
        num_tokens, table_rows(table_window), table_window, slots, pads,
    )  # fmt: skip


# An operator, so that graphs record the call and modes such as FakeTensorMode intercept it.
@torch.library.custom_op(add_op_namespace_prefix("grid_partition"), mutates_args=())
def _operator(
    grid: Sequence[int],
    window: Sequence[int],
    shift: Sequence[int],
    table_window: Sequence[int],
    pads_first: bool,
    device: torch.device,
) -> Tensor:
    sizes = (tuple(x) for x in (grid, window, shift, table_window))
    # Cloned, as compiled code may reuse the memory of an operator's result.
    return _tensors(*sizes, pads_first, device).clone()


@_operator.register_fake
def _(grid, window, shift, table_window, pads_first, device) -> Tensor:
    sizes = (tuple(x) for x in (grid, window, shift, table_window))
    shape = _arrays(*sizes, pads_first).shape
    return torch.empty(shape, dtype=torch.int32, device=device)


def _tensors(*key) -> Tensor:
    """The partition's tensors [4, 1, G, S] for a key of `grid_partition`."""
    return (_kept_for_good if is_capturing(key[-1]) else _on_device)(*key)


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured; the memory that it reads must never be freed."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.cache
def _kept_for_good(*key) -> Tensor:
    return _on_device(*key)


@_cached
def _on_device(*key) -> Tensor:
    *geometry, device = key
    # Autograd refuses to save tensors made in inference mode.
    with torch.inference_mode(False):
        return torch.from_numpy(_arrays(*geometry)).to(device)


@_cached
def _arrays(
    grid: tuple[int, ...],
    window: tuple[int, ...],
    shift: tuple[int, ...],
    table_window: tuple[int, ...],
    pads_first: bool,
) -> np.ndarray:
    """The tensors on the CPU, int32 [4, 1, G, S]."""
    token, segment = cut_windows(grid, window, shift, pads_first)
    with torch.inference_mode(False), _disable_current_modes():
        part = partition_from_windows(
            token, table_window, segment=segment, pad=bool((token < 0).any())
        )
        return torch.stack(part.tensors).numpy()


def cut_windows(
    grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], pads_first: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The token in each slot, int [windows, slots], -1 in padding; and its segment, int likewise.

    A new segment begins where a rolled axis wraps around.
    """
    padding = [(0, -size % side) for size, side in zip(grid, window, strict=True)]
    token = np.arange(math.prod(grid)).reshape(grid)
    if pads_first:
        token = np.pad(token, padding, constant_values=-1)
    token = np.roll(token, [-moved for moved in shift], range(len(grid)))
    if not pads_first:
        token = np.pad(token, padding, constant_values=-1)
    segment = np.zeros((), np.int64)
    sizes: tuple[int, ...] = token.shape
    for place, size, moved in zip(np.indices(sizes), sizes, shift, strict=True):
        segment = 2 * segment + (place >= size - moved)
    return _into_windows(token, window), _into_windows(segment, window)


def _into_windows(x: np.ndarray, window: tuple[int, ...]) -> np.ndarray:
    """A padded grid -> [windows, slots]."""
    sizes = [n for size, side in zip(x.shape, window, strict=True) for n in (size // side, side)]
    axes = [*range(0, len(sizes), 2), *range(1, len(sizes), 2)]
    return x.reshape(sizes).transpose(axes).reshape(-1, math.prod(window))
