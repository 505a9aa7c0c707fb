"""Partitions of windows that the caller has cut.

Written in PyTorch operators, so that a partition can be made on any device and inside a compiled
function.
"""

from __future__ import annotations

import math
from operator import index as as_int

import numpy as np
import torch
from torch import Tensor

from . import _planner
from .partition import (
    INT32_MAX,
    LARGEST_SHORT_GROUP,
    GroupPartition,
    positive,
    table_rows,
    window_axes,
)


def partition_from_windows(
    token_index: Tensor | np.ndarray,
    window_size: int | tuple[int, ...] | None = None,
    *,
    segment: Tensor | np.ndarray | None = None,
    mask: Tensor | np.ndarray | None = None,
    coords: Tensor | np.ndarray | None = None,
    bias_index: Tensor | np.ndarray | None = None,
    pad: bool = False,
    num_tokens: int | None = None,
) -> GroupPartition:
    """A partition of windows of n slots each, as Swin and its variants cut them.

    The row of the bias table for a pair of slots comes from `window_size` (with `coords`) or from
    `bias_index`; with neither there is no bias.

    Args:
        token_index: the token in each slot, integers [W, n], the same for the whole batch, or
            [P, W, n], one per image; -1 where a slot is empty. In any order, each token at most
            once; the output and the gradients of a token in no window are zero.
        window_size: M for two axes, or one number per axis (1 to 3): the table has
            ``prod(2 * M - 1)`` rows, ordered as Swin's.
        segment: integer labels [W, n], or [P, W, n] for P images: a token attends to tokens of its
            own label only.
        mask: [W, n, n], 0 (or False) where two slots attend to each other, anything else where not,
            as Swin's ``attn_mask`` of 0 and -100. Slots that attend to each other must form
            segments. Without `pad`, entries of empty slots are ignored.
        coords: the position of each slot in its window, integers [n, axes], [W, n, axes] or
            [P, W, n, axes]; within a window they differ by less than M on each axis. Needs
            `window_size`. None: slot i is at place i of the window, row-major.
        bias_index: the table's row for each pair, integers [n, n], [n * n] or [W, n, n] (Swin's
            ``relative_position_index``); it must be the sum of a term of the query and a term of
            the key. The table has as many rows as `window_size` says, or else one more than the
            largest index.
        pad: whether empty slots are padding that is attended to, each with the operator's
            `pad_value` as its q, k and v. Libraries that pad a grid to whole windows do that;
            `pad_value` is then the bias of their qkv layer. No output is computed for padding.
        num_tokens: N, the tokens of an image; None: one more than the largest index. If given, a
            partition on a GPU, or inside ``torch.compile(fullgraph=True)``, is made without waiting
            for the device, and values are not checked. Then, with `pad`, each token must be in a
            window, and without `window_size` the table must have the rows that `bias_index` names.

    Returns:
        A :class:`GroupPartition` on the device of `token_index`.

    Raises:
        TypeError: an index, a label, a position or a size is not an integer.
        ValueError: shapes do not fit, there is no token, a token appears twice or is beyond
            `num_tokens`, a mask does not cut windows into segments, a `bias_index` is not such a
            sum, positions differ by M or more, two slots of one window are at one place, or two
            arguments say the same (`segment` and `mask`, `coords` and `bias_index`).
    """
    index = _integers(token_index, "token_index")
    if index.dim() not in (2, 3) or 0 in index.shape:
        raise ValueError(
            f"token_index has shape {list(index.shape)}; pass [windows, slots] or one per image,"
            " [images, windows, slots], not empty"
        )
    index = index if index.dim() == 3 else index[None]
    device = index.device
    _, windows, slots = index.shape
    if windows * slots > INT32_MAX:
        raise ValueError(
            f"token_index has {windows * slots} slots; an image must have fewer than 2**31"
        )
    tracing = torch.compiler.is_compiling()
    checks = num_tokens is None or (device.type == "cpu" and not tracing)
    if num_tokens is not None and not tracing:
        num_tokens = positive(num_tokens, "num_tokens")
    if num_tokens is None or checks:
        num_tokens = _check_tokens(index, num_tokens)
    is_slot = torch.ones_like(index[0], dtype=torch.bool) if pad else (index >= 0).any(0)
    labels = _labels(segment, mask, index, is_slot, checks)
    # Each window has n numbers, as each of its slots may be a segment of its own.
    window_id = (torch.arange(windows, device=device) * slots)[:, None]
    if labels is not None:
        window_id = window_id + _ranks(labels)
    window_id = window_id.broadcast_to(index.shape)
    is_used = index >= 0
    if pad:  # padding that no token attends to is as good as empty
        tokens = index.new_zeros(index.shape[0], windows * slots)
        tokens = tokens.scatter_add(1, window_id.flatten(1), is_used.long().flatten(1))
        is_used = tokens.gather(1, window_id.flatten(1)).view_as(index) > 0
    window_id = torch.where(is_used, window_id, -1)
    if coords is not None:
        coords = _integers(coords, "coords").to(device)
    query_row, key_row, window, rows = _bias_rows(window_size, coords, bias_index, index, checks)
    query_row, key_row = (torch.where(window_id >= 0, x, 0) for x in (query_row, key_row))
    if checks and coords is not None and window is not None:
        _check_coords(window_id, coords, window)
    if checks and rows:
        _check_rows(window_id, query_row, key_row, rows)
    room = max(windows * slots, num_tokens)
    if pad:  # tokens in no window cannot take the slots of padding
        fewest = int((index >= 0).flatten(1).sum(1).min()) if checks else num_tokens
        room = max(room, windows * slots + num_tokens - fewest)
    tensors = _grouped((index, window_id, query_row, key_row), num_tokens, room)
    token_index, window_id, query_row, key_row = (x.int().contiguous() for x in tensors)
    return GroupPartition(
        token_index, window_id, query_row, key_row, num_tokens, rows, window, slots
    )


def _grouped(tensors: tuple[Tensor, ...], num_tokens: int, room: int) -> list[Tensor]:
    """Slots [P, W, n] arranged in groups [P, G, S], in the order that a GroupPartition promises.

    room: how many slots the windows and the tokens in no window need, which take free slots.
    """
    images, windows, slots = tensors[0].shape
    # Sizes may be symbolic while tracing; n becomes a constant of the trace.
    size = min(_windows_per_group(as_int(slots)), windows) * slots
    groups = -(-room // size)
    more = (0, groups * size - windows * slots)
    index, window_id, query_row, key_row = (
        torch.nn.functional.pad(x.reshape(images, -1), more, value=value)
        for x, value in zip(tensors, (-1, -1, 0, 0), strict=True)
    )
    index = _with_all_tokens(index, window_id < 0, num_tokens)
    # Sorted by window, tokens before padding; then tokens in no window; then empty slots.
    last, empty = 2 * windows * slots, (index < 0).long()
    place = torch.where(window_id >= 0, 2 * window_id, last) + empty
    order = place.view(images, groups, size).argsort(dim=-1, stable=True)
    sorted_tensors = [
        x.view(images, groups, size).gather(-1, order)
        for x in (index, window_id, query_row, key_row)
    ]
    # Groups without tokens come last. Tokens are first in a group, so its first slot tells.
    order = (sorted_tensors[0][..., :1] < 0).long().argsort(dim=1, stable=True).expand(-1, -1, size)
    return [x.gather(1, order) for x in sorted_tensors]


def _with_all_tokens(index: Tensor, is_free: Tensor, num_tokens: int) -> Tensor:
    """index [P, T] with the tokens that are missing put into slots that are in no window."""
    is_there = index.new_zeros(index.shape[0], num_tokens + 1)
    is_there = is_there.scatter(1, torch.where(index >= 0, index, num_tokens), 1)[:, :num_tokens]
    # Missing tokens first, free slots first: the k-th missing token takes the k-th free slot.
    token = is_there.argsort(dim=1, stable=True)
    slot = (~is_free).long().argsort(dim=1, stable=True)[:, :num_tokens]
    is_missing = is_there.gather(1, token) == 0
    return index.scatter(1, slot, torch.where(is_missing, token, index.gather(1, slot)))


@torch.compiler.assume_constant_result
def _windows_per_group(slots: int) -> int:
    """How many windows share a group, at the least cost per window."""
    most = max(1, LARGEST_SHORT_GROUP // slots)
    return min(range(1, most + 1), key=lambda k: _planner.group_cost(k * slots) / k)


def _ranks(labels: Tensor) -> Tensor:
    """Labels along the last axis -> numbers from 0, equal where the labels are."""
    order = labels.argsort(dim=-1, stable=True)
    ordered = labels.gather(-1, order)
    new = torch.nn.functional.pad((ordered.diff(dim=-1) != 0).long(), (1, 0))
    return torch.empty_like(labels).scatter(-1, order, new.cumsum(-1))


def _labels(segment, mask, index: Tensor, is_slot: Tensor, checks: bool) -> Tensor | None:
    """Labels that broadcast to [P, W, n]; None: all tokens of a window attend to each other.

    is_slot: [W, n], whether a slot holds a token of any image, or padding that attends.
    """
    _, windows, slots = index.shape
    if segment is not None and mask is not None:
        raise ValueError("segment and mask both say which slots attend; give one of them")
    if segment is not None:
        labels = _integers(segment, "segment").to(index.device)
        return _shaped(labels, "segment", tuple(index.shape), (2, 3))
    if mask is None:
        return None
    mask = _tensor(mask).to(index.device)
    if mask.shape != (windows, slots, slots):
        raise ValueError(
            f"mask has shape {list(mask.shape)}; pass {[windows, slots, slots]}, one per window"
        )
    attends = (mask == 0) & is_slot[:, None]
    labels = attends.byte().argmax(-1)  # the first slot that a slot attends to
    if checks:
        wrong = (labels[:, :, None] == labels[:, None]) != attends
        wrong = wrong & is_slot[:, :, None] & is_slot[:, None]
        if wrong.any():
            window, i, j = (int(x) for x in wrong.nonzero()[0])
            raise ValueError(
                f"mask does not cut windows into segments: in window {window}, slot {i}"
                f" {'attends' if attends[window, i, j] else 'does not attend'} to slot {j};"
                " slots that attend to each other must attend to the same slots, and to themselves"
            )
    return labels


def _bias_rows(
    window_size, coords, bias_index, index: Tensor, checks: bool
) -> tuple[Tensor, Tensor, tuple[int, ...] | None, int | None]:
    """query_row and key_row that broadcast to [P, W, n], the window, the table's rows.

    The rows are None where only the device knows them.
    """
    _, windows, slots = index.shape
    window = None if window_size is None else window_axes(window_size)
    if bias_index is not None:
        if coords is not None:
            raise ValueError("coords and bias_index both choose the table's rows; give one of them")
        query_row, key_row, largest = _summands(bias_index, windows, slots, index.device, checks)
        if window is not None:
            return query_row, key_row, window, table_rows(window)
        return query_row, key_row, None, None if largest is None else largest + 1
    if window is None:
        if coords is not None:
            raise ValueError("coords need a window_size, which bounds how far apart slots may be")
        nothing = index.new_zeros(())
        return nothing, nothing, None, 0
    if coords is None:
        if slots > math.prod(window):
            raise ValueError(
                f"token_index has {slots} slots in a window of {' x '.join(map(str, window))};"
                " pass coords"
            )
        place = torch.arange(slots, device=index.device)
        axes = []
        for side in reversed(window):
            axes.append(place % side)
            place = place // side
        coords = torch.stack(axes[::-1], -1)
    else:
        shape = (*index.shape, len(window))
        coords = _shaped(coords, "coords", shape, (2, 3, 4))
    place = index.new_zeros(())
    for axis, side in enumerate(window):
        place = place * (2 * side - 1) + coords[..., axis]
    rows = table_rows(window)
    return place + (rows - 1) // 2, -place, window, rows


def _summands(
    bias_index, windows: int, slots: int, device: torch.device, checks: bool
) -> tuple[Tensor, Tensor, int | None]:
    """bias_index as terms of the query and of the key; and the largest index, if checked."""
    row = _integers(bias_index, "bias_index").to(device)
    if row.shape == (slots * slots,):
        row = row.view(slots, slots)
    if row.shape not in ((slots, slots), (windows, slots, slots)):
        raise ValueError(
            f"bias_index has shape {list(row.shape)}; pass the table's row for each pair of slots,"
            f" {[slots, slots]} or {[windows, slots, slots]}"
        )
    row = row if row.dim() == 3 else row[None]
    query_row, key_row = row[:, :, 0], row[:, 0] - row[:, :1, 0]
    if not checks:
        return query_row, key_row, None
    wrong = query_row[:, :, None] + key_row[:, None] != row
    if wrong.any():
        window, i, j = (int(x) for x in wrong.nonzero()[0])
        raise ValueError(
            "bias_index must be the sum of a term of the query and a term of the key, but that of"
            f" slots {i} and {j} in window {window} is {row[window, i, j]}, not"
            f" {query_row[window, i]} + {key_row[window, j]}"
        )
    if row.min() < 0 or row.max() > INT32_MAX:
        raise ValueError(
            f"bias_index must lie in [0, 2**31), but goes from {row.min()} to {row.max()}"
        )
    return query_row, key_row, int(row.max())


def _check_tokens(index: Tensor, num_tokens: int | None) -> int:
    """Each token at most once; returns N."""
    lowest, highest = int(index.min()), int(index.max())
    if highest < 0:
        raise ValueError("token_index names no token; at least one slot must not be -1")
    num_tokens = highest + 1 if num_tokens is None else num_tokens
    if lowest < -1 or highest >= num_tokens:
        raise ValueError(
            f"token_index goes from {lowest} to {highest}; it must lie in [0, {num_tokens}), or be"
            " -1 where a slot is empty"
        )
    ordered = index.flatten(1).sort(1).values
    twice = (ordered.diff(dim=1) == 0) & (ordered[:, 1:] >= 0)
    if twice.any():
        image, position = (int(x) for x in twice.nonzero()[0])
        raise ValueError(
            f"token_index names token {int(ordered[image, position])} of image {image} twice; give"
            " each token at most one slot"
        )
    return num_tokens


def _extent(window_id: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest of x [P, W, n] in each window, by window_id; 0 for those without slots."""
    images, windows, slots = window_id.shape
    number = (window_id + 1).flatten(1)  # 0: no window
    x = x.broadcast_to(window_id.shape).flatten(1)
    nothing = x.new_zeros(images, windows * slots + 1)
    low, high = (
        nothing.scatter_reduce(1, number, x, how, include_self=False)[:, 1:]
        for how in ("amin", "amax")
    )
    return low, high


def _check_coords(window_id: Tensor, coords: Tensor, window: tuple[int, ...]) -> None:
    """Slots of a window are less than M apart on each axis, and row numbers fit 32 bits."""
    for axis, side in enumerate(window):
        low, high = _extent(window_id, coords[..., axis])
        if (high - low >= side).any():
            raise ValueError(
                f"coords of two slots of one window differ by {int((high - low).max())} on axis"
                f" {axis}, where the window is {side}; pass a larger window_size"
            )
        if max(high.max(), -low.min()) > INT32_MAX // 2 // table_rows(window):
            raise ValueError("coords are too large; count them from the corner of the window")


def _check_rows(window_id: Tensor, query_row: Tensor, key_row: Tensor, rows: int) -> None:
    """Every pair of a window has a row of the table, and a query has another row for each key."""
    slots = window_id.shape[2]
    number = (window_id + 1).flatten(1)  # 0: no window
    of_query, of_key = _extent(window_id, query_row), _extent(window_id, key_row)
    wrong = (of_query[0] + of_key[0] < 0) | (of_query[1] + of_key[1] >= rows)
    if wrong.any():
        raise ValueError(
            f"two slots of one window are too far apart for the {rows} rows of the bias table"
            f" (window {int(wrong.nonzero()[0, 1]) // slots} of image"
            f" {int(wrong.nonzero()[0, 0])}); pass a larger window_size or another bias_index"
        )
    span = int(key_row.max() - key_row.min()) + 1
    pair = (number * span + key_row.flatten(1) - key_row.min()).sort(1).values
    same = (pair.diff(dim=1) == 0) & (pair[:, 1:] >= span)
    if same.any():
        image, position = (int(x) for x in same.nonzero()[0])
        window = (int(pair[image, position]) // span - 1) // slots
        raise ValueError(
            f"two slots of window {window} of image {image} take the same rows of the bias table,"
            " as if they were at one place; give each a place of its own"
        )


def _shaped(x: Tensor, name: str, shape: tuple[int, ...], axes: tuple[int, ...]) -> Tensor:
    """x, whose shape must be that of the last k axes of `shape`, with k one of `axes`."""
    fits = [shape[-number:] for number in axes]
    if tuple(x.shape) not in fits:
        expected = " or ".join(str(list(one)) for one in fits)
        raise ValueError(f"{name} has shape {list(x.shape)}; pass {expected}")
    return x


def _integers(x: Tensor | np.ndarray, name: str) -> Tensor:
    x = _tensor(x)
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {x.dtype}; pass integers")
    return x.long()


def _tensor(x: Tensor | np.ndarray) -> Tensor:
    """x as a tensor; an array stays on the CPU, whatever the default device."""
    if isinstance(x, Tensor):
        return x
    return torch.from_numpy(np.array(x))
