"""Group partitions: which visible tokens attend together, planned on the CPU.

A Swin block attends inside windows. With three quarters of the tokens hidden, a window holds
anything from none to all of its tokens. So windows are packed into groups of S slots, and attention
runs group by group (Huang et al., NeurIPS 2022, arXiv 2205.13515, section 3.2). The work is done in
C++ (``csrc/partition``) without the interpreter lock; the cost model that chooses the group size is
in ``csrc/partition/grouping.cpp``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _planner

INT32_MAX = 2**31 - 1
LARGEST_SHORT_GROUP = 64  # slots; kernels hold a short group in one tile, and loop over longer ones
TENSORS = ("token_index", "window_id", "query_row", "key_row")


@dataclass(frozen=True, eq=False, repr=False)
class GroupPartition:
    """Which tokens attend together; made by :func:`group_partition` or
    :func:`greenmim_kernels.partition_from_windows`.

    P is 1 (one partition for the whole batch) or the batch size, G the number of groups, S the
    slots of a group. A slot holds one token or is empty. Inside a group, slots are sorted by
    window; those without a window come last, as do groups without tokens. Kernels on a GPU trust
    all this: to check it they would have to wait for the device.

    Attributes:
        token_index: int32 [P, G, S], the token's position among those of its image; -1 in empty
            slots. Every token is in exactly one slot. An empty slot with a window is padding that
            attends, as the operator's `pad_value`; it comes after the window's tokens.
        window_id: int32 [P, G, S], equal for slots that attend to each other; -1 in empty slots
            without a window, and for tokens in no window, whose output and gradients are zero. A
            window is never split between groups.
        query_row, key_row: int32 [P, G, S]. The bias table's row of query i and key j of one window
            is query_row[i] + key_row[j]; key_row differs between the slots of a window.
        num_tokens: N, the tokens of an image.
        table_rows: rows of the bias table; 0 without a bias, None if only the table itself tells.
        window_size: (Mh, Mw), or one number per axis; None if the partition was made without it.
        window_slots: the most slots that a window may have.
    """

    token_index: Tensor
    window_id: Tensor
    query_row: Tensor
    key_row: Tensor
    num_tokens: int
    table_rows: int | None
    window_size: tuple[int, ...] | None
    window_slots: int

    @property
    def num_partitions(self) -> int:
        """P: 1, or one partition per image."""
        return self.token_index.shape[0]

    @property
    def num_groups(self) -> int:
        """G, groups that are all padding included."""
        return self.token_index.shape[1]

    @property
    def group_size(self) -> int:
        """S, slots per group."""
        return self.token_index.shape[2]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """token_index, window_id, query_row, key_row."""
        return self.token_index, self.window_id, self.query_row, self.key_row

    def map(self, change: Callable[[Tensor], Any]) -> GroupPartition:
        """The same partition with each of its tensors changed.

        Args:
            change: called with each int32 tensor [P, G, S]; returns its replacement.
        """
        return replace(self, **{name: change(getattr(self, name)) for name in TENSORS})

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> GroupPartition:
        """The same partition with its tensors on another device.

        Args:
            device: the device.
            non_blocking: whether copies from pinned memory may be asynchronous.
        """
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> GroupPartition:
        """The same partition in pinned (page-locked) memory, for asynchronous copies."""
        return self.map(Tensor.pin_memory)

    def __repr__(self) -> str:
        return (
            f"GroupPartition(num_partitions={self.num_partitions}, num_groups={self.num_groups},"
            f" group_size={self.group_size}, num_tokens={self.num_tokens},"
            f" table_rows={self.table_rows}, window_size={self.window_size},"
            f" device={self.token_index.device})"
        )


def group_partition(
    visible: np.ndarray | Tensor,
    window_size: int | tuple[int, ...] = 7,
    shift_size: int | tuple[int, ...] = 0,
    group_size: int | None = None,
    capacity: int | None = None,
    segment: np.ndarray | Tensor | None = None,
) -> GroupPartition:
    """Pack the windows of a grid of visible tokens into groups.

    A token at row h lies in window row ``(h + (Mh - s) % Mh) // Mh``, other axes likewise; border
    windows may be smaller, nothing wraps. The window may exceed the grid. Where the window does not
    divide the grid, libraries that pad attend to the padding too; this does not.

    Args:
        visible: the token grid, True = visible: bool [H, W], one for the whole batch, or
            [B, H, W], one per image, each with the same number of visible tokens; with three axes
            [D, H, W] or [B, D, H, W], with one [W] or [B, W]. A NumPy array or a torch tensor on
            the CPU, contiguous or not.
        window_size: M for two axes of the same size, or one number per axis: (Mh, Mw), or
            (Md, Mh, Mw) for volumes and videos; its length, 1 to 3, is the number of axes.
        shift_size: s or one number per axis, 0 <= shift < window on each; taken literally.
        group_size: slots per group, at least the visible tokens of the fullest window. None lets
            the cost model choose a multiple of 16; with a capacity, None means
            ``min(prod(M), N)`` rounded up to a multiple of 16, which depends on shapes only.
        capacity: the number of groups to pad to. None means as many as needed (with one grid per
            image, by the image that needs most).
        segment: integer labels shaped like `visible`: a token attends to tokens of its own label
            only, within its window (several images mixed in one grid). None: one label for all.

    Returns:
        A :class:`GroupPartition` on the CPU; tokens are numbered in row-major order of their grid,
        and its table has ``prod(2 * M - 1)`` rows. The same input always gives the same groups.

    Raises:
        TypeError: ``visible`` is not a bool array, labels or a size are not integers, or a size has
            another number of axes.
        ValueError: wrong shape or device, no visible token, unequal counts between images, a size
            below 1, a shift outside its window, a group size below the fullest window, or a
            capacity below the groups needed.
    """
    visible = _on_cpu(visible, "visible", "a bool NumPy array or torch tensor")
    if visible.dtype != np.bool_:
        raise TypeError(
            f"visible has dtype {visible.dtype}; pass bool, True = visible (for 0/1: visible == 1)"
        )
    window = window_axes(window_size)
    shift = _shift_axes(shift_size, window)
    axes, shape = len(window), visible.shape
    if len(shape) not in (axes, axes + 1) or 0 in shape or math.prod(shape[-axes:]) > INT32_MAX:
        names = ", ".join("DHW"[-axes:])
        raise ValueError(
            f"visible has shape {tuple(shape)}; for a window of {axes} axes pass a token grid"
            f" [{names}] or one per image [B, {names}], neither empty nor above 2**31 - 1 tokens"
        )
    num_segments = 1
    if segment is not None:
        segment, num_segments = _segments(segment, visible, axes)
        windows = _num_windows(shape[-axes:], window, shift)
        if windows * num_segments > INT32_MAX:
            raise ValueError(
                f"segment has {num_segments} different labels for {windows} windows; their product"
                " must be below 2**31"
            )
    *arrays, num_tokens = _planner.group_partition(
        visible,
        window,
        shift,
        segment,
        num_segments,
        0 if group_size is None else positive(group_size, "group_size"),
        0 if capacity is None else positive(capacity, "capacity"),
    )
    token_index, window_id, query_row, key_row = map(torch.from_numpy, arrays)
    rows, slots = table_rows(window), math.prod(window)
    return GroupPartition(
        token_index, window_id, query_row, key_row, num_tokens, rows, window, slots
    )


def partition_capacity(
    grid_size: int | tuple[int, ...],
    window_size: int | tuple[int, ...],
    shift_size: int | tuple[int, ...],
    num_tokens: int,
    group_size: int | None = None,
    num_segments: int = 1,
) -> int:
    """A number of groups that suffices for every mask with this many visible tokens.

    Packing never leaves two groups that fit together, so with G > 1 groups any two of them hold at
    least S + 1 tokens. Added up over the G * (G - 1) / 2 pairs, where every group occurs G - 1
    times, (G - 1) * N >= G * (G - 1) / 2 * (S + 1), hence G <= 2 * N / (S + 1). Nor are there more
    groups than windows or tokens. Windows of just over S / 2 tokens reach the bound.

    Args:
        grid_size: H = W, or one number per axis, in tokens.
        window_size: M or one number per axis.
        shift_size: s or one number per axis, 0 <= shift < window.
        num_tokens: N, visible tokens of an image.
        group_size: S; None means the size that :func:`group_partition` takes with a capacity,
            ``min(prod(M), N)`` rounded up to a multiple of 16.
        num_segments: the most labels that an image has.

    Returns:
        The bound on G, at least 1: a `capacity` for :func:`group_partition`.

    Raises:
        TypeError: a size is not an integer, or has another number of axes.
        ValueError: a size below 1, a shift outside its window, or more tokens than the grid has.
    """
    window = window_axes(window_size)
    grid = _axes(grid_size, "grid_size", len(window))
    if min(grid) < 1:
        raise ValueError(f"grid_size={grid_size} must be at least 1 on each axis")
    shift = _shift_axes(shift_size, window)
    num_tokens = positive(num_tokens, "num_tokens")
    if num_tokens > math.prod(grid):
        raise ValueError(
            f"num_tokens={num_tokens} is more than the {_times(grid)} tokens of the grid"
        )
    if group_size is None:
        group_size = _planner.fixed_group_size(math.prod(window), num_tokens)
    else:
        group_size = positive(group_size, "group_size")
    windows = _num_windows(grid, window, shift) * positive(num_segments, "num_segments")
    return max(1, min(2 * num_tokens // (group_size + 1), windows, num_tokens))


def pack_windows(counts: Sequence[int] | np.ndarray, group_size: int) -> list[np.ndarray]:
    """Pack windows into as few groups as the search finds: the optimum in small cases.

    Args:
        counts: tokens of each window, positive integers [windows].
        group_size: the most tokens that a group may hold.

    Returns:
        One int64 array of window indices per group, in increasing order inside a group; every
        window is in exactly one group, and no two groups would fit into one. The fullest group
        comes first. The same counts always give the same groups. No windows give no groups.

    Raises:
        TypeError: counts or the group size are not integers.
        ValueError: counts are not one-dimensional, a count is below 1 or above the group size, or
            the group size is below 1.
    """
    group_size = positive(group_size, "group_size")
    array = np.asarray(counts)
    if array.ndim != 1:
        raise ValueError(f"counts has shape {array.shape}; pass one count per window, [windows]")
    if array.size == 0:
        return []
    if array.dtype.kind not in "iu":
        raise TypeError(f"counts has dtype {array.dtype}; pass integers")
    low, high = array.min(), array.max()
    if low < 1:
        raise ValueError(
            f"counts[{array.argmin()}] is {low}; leave out windows without tokens,"
            " every count must be at least 1"
        )
    if high > group_size:
        raise ValueError(
            f"counts[{array.argmax()}] is {high}, more than group_size={group_size};"
            " a window is never split, so pass a group_size of at least the largest count"
        )
    return _planner.pack_windows(array.astype(np.int32), group_size)


def table_rows(window: tuple[int, ...]) -> int:
    """Rows of Swin's bias table: one per difference between two positions in a window."""
    return math.prod([2 * side - 1 for side in window])  # a list: Dynamo traces no generator here


def window_axes(window_size: int | tuple[int, ...]) -> tuple[int, ...]:
    """One number per axis; an integer stands for two axes."""
    axes = len(window_size) if isinstance(window_size, (tuple, list)) else 2
    window = _axes(window_size, "window_size", axes)
    if min(window) < 1 or table_rows(window) > INT32_MAX:
        raise ValueError(
            f"window_size={window_size} must be at least 1 on each axis, and small enough for its"
            " bias table to have fewer than 2**31 rows, prod(2 M - 1)"
        )
    return window


def _axes(value: int | tuple[int, ...], name: str, number: int) -> tuple[int, ...]:
    try:
        if not isinstance(value, (tuple, list)):
            return (index(value),) * number
        if 1 <= len(value) <= 3 and len(value) == number:
            return tuple(map(index, value))
    except TypeError:
        pass
    expected = "1 to 3" if name == "window_size" else number
    raise TypeError(
        f"{name}={value!r} must be an integer, or a tuple of {expected} integers, one per axis"
    )


def _shift_axes(shift_size: int | tuple[int, ...], window: tuple[int, ...]) -> tuple[int, ...]:
    shift = _axes(shift_size, "shift_size", len(window))
    if not all(0 <= moved < side for moved, side in zip(shift, window, strict=True)):
        raise ValueError(
            f"shift_size={shift_size} must lie in [0, window) on each axis, and the window is"
            f" {_times(window)}"
        )
    return shift


def _num_windows(grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]) -> int:
    return math.prod(
        (size - 1 + (side - moved) % side) // side + 1
        for size, side, moved in zip(grid, window, shift, strict=True)
    )


def _times(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))


def _on_cpu(array: np.ndarray | Tensor, name: str, expected: str) -> np.ndarray:
    if isinstance(array, Tensor):
        if array.device.type != "cpu":
            raise ValueError(
                f"{name} is on {array.device}, but planning runs on the CPU; pass {name}.cpu()"
            )
        return array.numpy()
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} is a {type(array).__name__}; pass {expected}")
    return array


def _segments(
    segment: np.ndarray | Tensor, visible: np.ndarray, axes: int
) -> tuple[np.ndarray, int]:
    """Each image's labels renumbered from 0, int32, 0 where hidden; and the most in an image."""
    segment = _on_cpu(segment, "segment", "integer labels, a NumPy array or torch tensor")
    if segment.dtype.kind not in "iub":
        raise TypeError(f"segment has dtype {segment.dtype}; pass integer labels")
    if segment.shape != visible.shape:
        raise ValueError(
            f"segment has shape {tuple(segment.shape)}, visible {tuple(visible.shape)}; pass one"
            " label per token of the grid"
        )
    numbered, most = np.zeros(visible.shape, dtype=np.int32), 1
    grid = visible.shape[-axes:]
    images = (x.reshape(-1, *grid) for x in (visible, segment, numbered))
    for kept, own, to in zip(*images, strict=True):  # labels are numbered per image
        labels, to[kept] = np.unique(own[kept], return_inverse=True)
        most = max(most, len(labels))
    return numbered, most


def positive(value: int, name: str) -> int:
    try:
        number = index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r} must be an integer") from None
    if not 0 < number <= INT32_MAX:
        raise ValueError(f"{name}={number} must lie in [1, 2**31 - 1]")
    return number
