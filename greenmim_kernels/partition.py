"""Group partitions: which visible tokens attend together, planned on the CPU.

A Swin block attends inside windows. With three quarters of the tokens hidden, windows hold anything
from nothing to all of their tokens, so windows are packed into groups of nearly equal size, and
attention runs over groups (Huang et al., NeurIPS 2022, arXiv 2205.13515, section 3.2). The work is
done in C++ (``csrc/partition``) with the interpreter lock released; the cost model that chooses the
group size stands in ``csrc/partition/grouping.cpp``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import index

import numpy as np
import torch
from torch import Tensor

from . import _partition

_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, eq=False, repr=False)
class GroupPartition:
    """All groups of one grid, window size and shift; made by :func:`group_partition`.

    P is 1 (one grid for the whole batch) or the batch size, G the number of groups, S the slots of
    a group. A slot holds one visible token or padding. Inside a group slots are sorted by window,
    tokens of a window in row-major order, padding last; groups without a token come last. Kernels
    on a GPU trust all this: to look again, they would have to wait for the device.

    Attributes:
        token_index: int32 [P, G, S], the token's position among the visible tokens of the image in
            row-major order; -1 in padding. Every token stands in exactly one slot.
        window_id: int32 [P, G, S], row * (number of window columns) + column of the token's window;
            -1 in padding. A window is never split between groups.
        coords: int32 [P, G, S, 2], (row, column) of the token in the grid; 0 in padding.
        num_tokens: N, the visible tokens of an image.
        window_size: (Mh, Mw).
        shift_size: (rows, columns).
        grid_size: (H, W).
    """

    token_index: Tensor
    window_id: Tensor
    coords: Tensor
    num_tokens: int
    window_size: tuple[int, int]
    shift_size: tuple[int, int]
    grid_size: tuple[int, int]

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

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> GroupPartition:
        """The same partition with its tensors on another device."""
        return replace(
            self,
            token_index=self.token_index.to(device, non_blocking=non_blocking),
            window_id=self.window_id.to(device, non_blocking=non_blocking),
            coords=self.coords.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> GroupPartition:
        """The same partition in page-locked memory, for copies that do not block."""
        return replace(
            self,
            token_index=self.token_index.pin_memory(),
            window_id=self.window_id.pin_memory(),
            coords=self.coords.pin_memory(),
        )

    def __repr__(self) -> str:
        return (
            f"GroupPartition(num_partitions={self.num_partitions}, num_groups={self.num_groups},"
            f" group_size={self.group_size}, num_tokens={self.num_tokens},"
            f" window_size={self.window_size}, shift_size={self.shift_size},"
            f" grid_size={self.grid_size}, device={self.token_index.device})"
        )


def group_partition(
    visible: np.ndarray | Tensor,
    window_size: int | tuple[int, int] = 7,
    shift_size: int | tuple[int, int] = 0,
    group_size: int | None = None,
    capacity: int | None = None,
) -> GroupPartition:
    """Packs the windows of a grid of visible tokens into groups.

    A token at row h lies in window row ``(h + (Mh - s) % Mh) // Mh``, columns likewise; border
    windows may be smaller, nothing wraps. The window may exceed the grid.

    Args:
        visible: the token grid, True = visible: bool [H, W], one for the whole batch, or
            [B, H, W], one per image, each with the same number of visible tokens. A NumPy array or
            a torch tensor on the CPU, contiguous or not.
        window_size: M or (Mh, Mw), in tokens.
        shift_size: s or (rows, columns), 0 <= shift < window on each axis; taken literally.
        group_size: slots per group, at least the visible tokens of the fullest window. None lets
            the cost model choose a multiple of 16; with a capacity, None means
            ``min(Mh * Mw, N)`` rounded up to a multiple of 16, which depends on shapes only.
        capacity: the number of groups to pad to. None means as many as needed (with one grid per
            image, as the image with most groups needs).

    Returns:
        A :class:`GroupPartition` on the CPU. The same input always gives the same groups.

    Raises:
        TypeError: ``visible`` is not a bool array, or a size is not an integer.
        ValueError: wrong shape or device, no visible token, unequal counts between images, a shift
            outside its window, a group size below the fullest window, or a capacity below the
            groups needed.
    """
    if isinstance(visible, Tensor):
        if visible.dtype != torch.bool:
            raise TypeError(_dtype_message(visible))
        if visible.device.type != "cpu":
            raise ValueError(
                f"visible is on {visible.device}, but planning runs on the CPU; pass visible.cpu()"
            )
        visible = visible.numpy()
    elif not isinstance(visible, np.ndarray):
        raise TypeError(
            f"visible is a {type(visible).__name__}; pass a bool NumPy array or torch tensor"
        )
    elif visible.dtype != np.bool_:
        raise TypeError(_dtype_message(visible))
    shape = visible.shape
    if len(shape) not in (2, 3) or 0 in shape or shape[-1] * shape[-2] > _INT32_MAX:
        raise ValueError(
            f"visible has shape {tuple(shape)}; pass a token grid [H, W] or one per image"
            " [B, H, W], neither empty nor above 2**31 - 1 tokens"
        )
    height, width = window_pair(window_size)
    shift = shift_rows, shift_columns = _shift_pair(shift_size, height, width)
    token_index, window_id, coords, num_tokens = _partition.group_partition(
        visible,
        height,
        width,
        shift_rows,
        shift_columns,
        0 if group_size is None else _positive(group_size, "group_size"),
        0 if capacity is None else _positive(capacity, "capacity"),
    )
    return GroupPartition(
        torch.from_numpy(token_index),
        torch.from_numpy(window_id),
        torch.from_numpy(coords),
        num_tokens,
        (height, width),
        shift,
        shape[-2:],
    )


def partition_capacity(
    grid_size: int | tuple[int, int],
    window_size: int | tuple[int, int],
    shift_size: int | tuple[int, int],
    num_tokens: int,
    group_size: int | None = None,
) -> int:
    """The number of groups that is enough for every grid with so many visible tokens.

    Packing never leaves two groups that fit together, so with G > 1 groups any two of them hold at
    least S + 1 tokens. Added up over the G * (G - 1) / 2 pairs, where every group occurs G - 1
    times, (G - 1) * N >= G * (G - 1) / 2 * (S + 1), hence G <= 2 * N / (S + 1). Nor are there more
    groups than windows or tokens. Windows of just over S / 2 tokens reach the bound.

    Args:
        grid_size: H = W or (H, W), in tokens.
        window_size: M or (Mh, Mw).
        shift_size: s or (rows, columns), 0 <= shift < window.
        num_tokens: N, visible tokens of an image.
        group_size: S; None means the size that :func:`group_partition` takes with a capacity,
            ``min(Mh * Mw, N)`` rounded up to a multiple of 16.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size below 1, a shift outside its window, or more tokens than the grid has.
    """
    rows, columns = _pair(grid_size, "grid_size")
    if rows < 1 or columns < 1:
        raise ValueError(f"grid_size={grid_size} must be at least 1 on each axis")
    height, width = window_pair(window_size)
    shift_rows, shift_columns = _shift_pair(shift_size, height, width)
    num_tokens = _positive(num_tokens, "num_tokens")
    if num_tokens > rows * columns:
        raise ValueError(
            f"num_tokens={num_tokens} is more than the {rows} x {columns} tokens of the grid"
        )
    if group_size is None:
        group_size = _partition.fixed_group_size(height * width, num_tokens)
    else:
        group_size = _positive(group_size, "group_size")
    windows = _num_windows(rows, height, shift_rows) * _num_windows(columns, width, shift_columns)
    return max(1, min(2 * num_tokens // (group_size + 1), windows, num_tokens))


def pack_windows(counts: Sequence[int] | np.ndarray, group_size: int) -> list[np.ndarray]:
    """Packs windows into as few groups as it can find; on small cases that is the optimum.

    Args:
        counts: tokens of each window, positive integers [windows].
        group_size: tokens that a group may hold.

    Returns:
        One int64 array of window indices per group, in increasing order inside a group; every
        window stands in exactly one group, and no two groups would fit into one. The fullest group
        comes first. The same counts always give the same groups. No windows give no groups.

    Raises:
        TypeError: counts or the group size are not integers.
        ValueError: counts are not one-dimensional, a count is below 1 or above the group size, or
            the group size is below 1.
    """
    group_size = _positive(group_size, "group_size")
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
    return _partition.pack_windows(array.astype(np.int32), group_size)


def _num_windows(size: int, window: int, shift: int) -> int:
    return (size - 1 + (window - shift) % window) // window + 1


def _pair(value: int | tuple[int, int], name: str) -> tuple[int, int]:
    try:
        if isinstance(value, (tuple, list)):
            first, second = value
            return index(first), index(second)
        return (index(value),) * 2
    except (TypeError, ValueError):
        raise TypeError(f"{name}={value!r} must be an integer or a pair of integers") from None


def window_pair(window_size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = _pair(window_size, "window_size")
    if not (0 < height <= _INT32_MAX and 0 < width <= _INT32_MAX):
        raise ValueError(f"window_size={window_size} must lie in [1, 2**31 - 1] on each axis")
    return height, width


def _shift_pair(shift_size: int | tuple[int, int], height: int, width: int) -> tuple[int, int]:
    rows, columns = _pair(shift_size, "shift_size")
    if not (0 <= rows < height and 0 <= columns < width):
        raise ValueError(
            f"shift_size={shift_size} must lie in [0, window) on each axis, and the window is"
            f" {height} x {width}"
        )
    return rows, columns


def _positive(value: int, name: str) -> int:
    try:
        number = index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r} must be an integer") from None
    if not 0 < number <= _INT32_MAX:
        raise ValueError(f"{name}={number} must lie in [1, 2**31 - 1]")
    return number


def _dtype_message(visible: np.ndarray | Tensor) -> str:
    return f"visible has dtype {visible.dtype}; pass bool, True = visible (for 0/1: visible == 1)"
