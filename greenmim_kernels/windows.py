"""Partitions of windows that the caller has cut, as every windowed network cuts its own.

Written in PyTorch's operators, so that a partition can be made on any device and inside of a
compiled function.
"""

from __future__ import annotations

import math
from operator import index as index_of

import numpy as np
import torch
from torch import Tensor

from . import _planner
from .partition import GroupPartition, table_rows, window_axes

_INT32_MAX = 2**31 - 1
_LARGEST_TILE = 64  # slots of a group that a kernel takes at once


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
    """A partition from windows of n slots each, for attention as Swin and its relatives compute it.

    The row of the bias table that a pair of slots takes comes from `window_size` (with `coords`),
    or from `bias_index`; with neither there is no bias.

    Args:
        token_index: the token in each slot, integers [W, n], the same for the whole batch, or
            [P, W, n], one per image; -1 where a slot is empty. In any order, each token at most
            once; the output and the gradients of one that is in no window are zero.
        window_size: M for two axes, or one number per axis (1 to 3): the table has
            ``prod(2 * M - 1)`` rows, ordered as Swin's.
        segment: integer labels shaped like `token_index`: a token attends to its own label only.
        mask: [W, n, n], 0 where two slots attend to each other and anything else where not (Swin's
            ``attn_mask``, which is 0 or -100; of a bool mask, True where not); those that attend to
            each other must form segments. Empty slots do not matter.
        coords: with `window_size`, where a slot is in its window, integers [n, axes], [W, n, axes]
            or [P, W, n, axes]; differences are below M. None: slot i unravelled over `window_size`.
        bias_index: the table's row of each pair, integers [n, n], [n * n] or [W, n, n] (Swin's
            ``relative_position_index``), which must be a number of the query plus a number of the
            key. Its table has as many rows as `window_size` says, or else one more than the largest
            index.
        pad: whether the empty slots are tokens that attend and are attended to, with the same q, k
            and v each, the `pad_value` of the operator (libraries that pad a grid to whole windows
            do that: q, k and v are then the bias of their layer). Nothing is computed for them.
        num_tokens: N, the tokens of an image; None: one more than the largest index. Given, a
            partition of tensors on a GPU, or inside ``torch.compile(fullgraph=True)``, is made
            without waiting for the device, and then the values are trusted; with `pad` each token
            must then be in a window, and without `window_size` the table have the rows that
            `bias_index` names.

    Returns:
        A :class:`GroupPartition` on the device of `token_index`.

    Raises:
        TypeError: what should be integers is not.
        ValueError: shapes that do not fit, a token that stands twice or is beyond `num_tokens`, a
            mask that is no segmentation, an index that is no sum of two numbers, coordinates that
            differ by M or more, or two slots of one window at one place.
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
    if windows * slots > _INT32_MAX:
        raise ValueError(
            f"token_index has {windows * slots} slots; an image must have fewer than 2^31"
        )
    tracing = torch.compiler.is_compiling()
    checks = num_tokens is None or not (tracing or device.type != "cpu")
    if num_tokens is not None and not tracing:
        num_tokens = _count(num_tokens)
    if num_tokens is None or checks:
        num_tokens = _check_tokens(index, num_tokens)
    is_slot = torch.ones_like(index[0], dtype=torch.bool) if pad else (index >= 0).any(0)
    labels = _labels(segment, mask, index, is_slot, checks)
    # A window has room for as many numbers as segments.
    window_id = (torch.arange(windows, device=device) * slots)[:, None]
    if labels is not None:
        window_id = window_id + _ranks(labels)
    window_id = window_id.broadcast_to(index.shape)
    is_used = index >= 0
    if pad:  # what no token attends to is nothing
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
    if pad:  # its slots are not free for tokens in no window
        fewest = int((index >= 0).flatten(1).sum(1).min()) if checks else num_tokens
        room = max(room, windows * slots + num_tokens - fewest)
    tensors = _grouped((index, window_id, query_row, key_row), num_tokens, room)
    token_index, window_id, query_row, key_row = (x.int().contiguous() for x in tensors)
    return GroupPartition(
        token_index, window_id, query_row, key_row, num_tokens, rows, window, slots
    )


def _grouped(tensors: tuple[Tensor, ...], num_tokens: int, room: int) -> list[Tensor]:
    """Slots [P, W, n] in groups [P, G, S], in the order that a GroupPartition promises.

    `room`: slots that all of them and the tokens in no window need, which take free ones.
    """
    images, windows, slots = tensors[0].shape
    # Sizes may be symbolic while tracing; slots of a window become a constant of the trace.
    size = min(_windows_per_group(index_of(slots)), windows) * slots
    groups = -(-room // size)
    more = (0, groups * size - windows * slots)
    index, window_id, query_row, key_row = (
        torch.nn.functional.pad(x.reshape(images, -1), more, value=value)
        for x, value in zip(tensors, (-1, -1, 0, 0), strict=True)
    )
    index = _with_all_tokens(index, window_id < 0, num_tokens)
    # By window, its padding behind its tokens; then tokens in no window; then nothing.
    last, empty = 2 * windows * slots, (index < 0).long()
    place = torch.where(window_id >= 0, 2 * window_id, last) + empty
    order = place.view(images, groups, size).argsort(dim=-1, stable=True)
    sorted_tensors = [
        x.view(images, groups, size).gather(-1, order)
        for x in (index, window_id, query_row, key_row)
    ]
    order = (sorted_tensors[0][..., :1] < 0).long().argsort(dim=1, stable=True).expand(-1, -1, size)
    return [x.gather(1, order) for x in sorted_tensors]


def _with_all_tokens(index: Tensor, is_free: Tensor, num_tokens: int) -> Tensor:
    """index [P, T] with the tokens that it lacks in slots that are in no window."""
    stands = index.new_zeros(index.shape[0], num_tokens + 1)
    stands = stands.scatter(1, torch.where(index >= 0, index, num_tokens), 1)[:, :num_tokens]
    # Lacking tokens first, free slots first: the k-th of the one to the k-th of the other.
    token = stands.argsort(dim=1, stable=True)
    slot = (~is_free).long().argsort(dim=1, stable=True)[:, :num_tokens]
    lacks = stands.gather(1, token) == 0
    return index.scatter(1, slot, torch.where(lacks, token, index.gather(1, slot)))


@torch.compiler.assume_constant_result
def _windows_per_group(slots: int) -> int:
    """How many windows share a group, at the least cost of a window."""
    most = max(1, _LARGEST_TILE // slots)
    return min(range(1, most + 1), key=lambda k: _planner.group_cost(k * slots) / k)


def _ranks(labels: Tensor) -> Tensor:
    """Labels along the last axis -> numbers from 0 on, the same where labels are."""
    order = labels.argsort(dim=-1, stable=True)
    ordered = labels.gather(-1, order)
    new = torch.nn.functional.pad((ordered.diff(dim=-1) != 0).long(), (1, 0))
    return torch.empty_like(labels).scatter(-1, order, new.cumsum(-1))


def _labels(segment, mask, index: Tensor, is_slot: Tensor, checks: bool) -> Tensor | None:
    """Labels that broadcast to [P, W, n]; None: all tokens of a window attend to each other.

    is_slot: [W, n], whether it matters what a slot attends to.
    """
    _, windows, slots = index.shape
    if segment is not None and mask is not None:
        raise ValueError("segment and mask say the same twice; give one of them")
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
                f"mask does not cut windows into segments: in window {window}, slots {i} and {j}"
                f" {'attend' if attends[window, i, j] else 'do not attend'} to each other, unlike"
                " others that they share a segment with"
            )
    return labels


def _bias_rows(
    window_size, coords, bias_index, index: Tensor, checks: bool
) -> tuple[Tensor, Tensor, tuple[int, ...] | None, int | None]:
    """query_row and key_row that broadcast to [P, W, n], the window, the table's rows.

    None as rows: nobody knows without waiting for the device.
    """
    _, windows, slots = index.shape
    window = None if window_size is None else window_axes(window_size)
    if bias_index is not None:
        if coords is not None:
            raise ValueError("coords and bias_index say the same twice; give one of them")
        query_row, key_row, largest = _summands(bias_index, windows, slots, index.device, checks)
        if window is not None:
            return query_row, key_row, window, table_rows(window)
        return query_row, key_row, None, None if largest is None else largest + 1
    if window is None:
        if coords is not None:
            raise ValueError("coords need a window_size, which says how far apart slots may be")
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
    """bias_index as a number of the query and one of the key; and the largest index."""
    table = _integers(bias_index, "bias_index").to(device)
    if table.shape == (slots * slots,):
        table = table.view(slots, slots)
    if table.shape not in ((slots, slots), (windows, slots, slots)):
        raise ValueError(
            f"bias_index has shape {list(table.shape)}; pass the table's row of each pair of slots,"
            f" {[slots, slots]} or {[windows, slots, slots]}"
        )
    table = table if table.dim() == 3 else table[None]
    query_row, key_row = table[:, :, 0], table[:, 0] - table[:, :1, 0]
    if not checks:
        return query_row, key_row, None
    wrong = query_row[:, :, None] + key_row[:, None] != table
    if wrong.any():
        window, i, j = (int(x) for x in wrong.nonzero()[0])
        raise ValueError(
            "bias_index is no number of the query plus a number of the key: that of slots"
            f" {i} and {j} in window {window} is {table[window, i, j]}, not"
            f" {query_row[window, i]} + {key_row[window, j]}"
        )
    if table.min() < 0 or table.max() > _INT32_MAX:
        raise ValueError(
            f"bias_index must lie in [0, 2^31), and goes from {table.min()} to {table.max()}"
        )
    return query_row, key_row, int(table.max())


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
            f"token_index names token {int(ordered[image, position])} of image {image} twice; it"
            " must stand in one slot"
        )
    return num_tokens


def _extent(window_id: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest of x [P, W, n] in each window, by its number; 0 where there is none."""
    images, windows, slots = window_id.shape
    number = (window_id + 1).flatten(1)  # 0: in none
    x = x.broadcast_to(window_id.shape).flatten(1)
    nothing = x.new_zeros(images, windows * slots + 1)
    low, high = (
        nothing.scatter_reduce(1, number, x, how, include_self=False)[:, 1:]
        for how in ("amin", "amax")
    )
    return low, high


def _check_coords(window_id: Tensor, coords: Tensor, window: tuple[int, ...]) -> None:
    """Slots of a window are less than its side apart, and row numbers fit 32 bits."""
    for axis, side in enumerate(window):
        low, high = _extent(window_id, coords[..., axis])
        if (high - low >= side).any():
            raise ValueError(
                f"coords of two slots of one window differ by {int((high - low).max())} on axis"
                f" {axis}, where the window is {side}"
            )
        if max(high.max(), -low.min()) > _INT32_MAX // 2 // table_rows(window):
            raise ValueError("coords are too large; count them from the corner of the window")


def _check_rows(window_id: Tensor, query_row: Tensor, key_row: Tensor, rows: int) -> None:
    """Every pair of a window has a row of the table, and the keys of a query different ones."""
    slots = window_id.shape[2]
    number = (window_id + 1).flatten(1)  # 0: in none
    of_query, of_key = _extent(window_id, query_row), _extent(window_id, key_row)
    wrong = (of_query[0] + of_key[0] < 0) | (of_query[1] + of_key[1] >= rows)
    if wrong.any():
        raise ValueError(
            f"two slots of one window are too far apart for the {rows} rows of the bias table"
            f" (window {int(wrong.nonzero()[0, 1]) // slots} of image {int(wrong.nonzero()[0, 0])})"
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
    """x, whose shape must be the last so many axes of `shape`: one of these numbers."""
    fits = [shape[-number:] for number in axes]
    if tuple(x.shape) not in fits:
        expected = " or ".join(str(list(one)) for one in fits)
        raise ValueError(f"{name} has shape {list(x.shape)}; pass {expected}")
    return x


def _count(num_tokens: int) -> int:
    try:
        return index_of(num_tokens)
    except TypeError:
        raise TypeError(f"num_tokens={num_tokens!r} must be an integer") from None


def _integers(x: Tensor | np.ndarray, name: str) -> Tensor:
    x = _tensor(x)
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {x.dtype}; pass integers")
    return x.long()


def _tensor(x: Tensor | np.ndarray) -> Tensor:
    """On the device that it is on, whatever the default device."""
    if isinstance(x, Tensor):
        return x
    return torch.from_numpy(np.array(x))
