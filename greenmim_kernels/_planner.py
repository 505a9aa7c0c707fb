"""The compiled planner (``csrc/partition``) over NumPy arrays: its C interface, through ctypes.

It depends neither on PyTorch nor on the version of Python. `greenmim_kernels.partition` checks its
arguments first.
"""

from __future__ import annotations

import ctypes
import math

import numpy as np

from ._libraries import library_file

_FILE = library_file("_C_partition")
if _FILE is None:
    raise ImportError(
        "greenmim_kernels is not built here: this is its source folder, which Python takes before"
        " an installed package; leave the folder, or run `pip install -e .` in it."
    )
_library = ctypes.CDLL(str(_FILE))
_ERROR_BYTES = 512


def _declare(name: str, result: type | None, *arguments: type):
    function = getattr(_library, f"greenmim_{name}")
    function.restype, function.argtypes = result, arguments
    return function


_array, _int64, _int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_error = (ctypes.c_char_p, _int64)
fixed_group_size = _declare("fixed_group_size", _int64, _int64, _int64)
group_cost = _declare("group_cost", _int64, _int64)
_pack = _declare("pack_windows", _int64, _array, _int32, _int64, _array, *_error)
_group = _declare(
    "grouping", ctypes.c_void_p, _array, _int64, _int32, _array, _array, _array, _array, _int64,
    _int64, _int64, _array, *_error,
)  # fmt: skip
_fill = _declare("grouping_fill", _int32, ctypes.c_void_p, _array, _array, _array, _array, *_error)
_free = _declare("grouping_free", None, ctypes.c_void_p)


def _address(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


def _thrown(error: ctypes.Array) -> Exception:
    """The exception that C++ reported; without a message it was std::bad_alloc."""
    return ValueError(error.value.decode()) if error.value else MemoryError()


def pack_windows(counts: np.ndarray, group_size: int) -> list[np.ndarray]:
    """An int64 array of windows for each group; counts int32 [windows] in [1, group_size]."""
    counts = np.ascontiguousarray(counts, dtype=np.int32)
    group_of = np.empty_like(counts)
    error = ctypes.create_string_buffer(_ERROR_BYTES)
    groups = _pack(
        _address(counts), len(counts), group_size, _address(group_of), error, _ERROR_BYTES
    )
    if groups < 0:
        raise _thrown(error)
    by_group = np.argsort(group_of, kind="stable")
    return np.split(by_group, np.bincount(group_of, minlength=groups).cumsum()[:-1])


def group_partition(
    visible: np.ndarray,
    window: tuple[int, ...],
    shift: tuple[int, ...],
    segment: np.ndarray | None,
    num_segments: int,
    group_size: int,
    capacity: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """token_index, window_id, query_row and key_row, int32 [P, G, S], and the tokens of an image.

    Args:
        visible: bool [*grid] or [P, *grid]; the grid has as many axes as the window.
        window, shift: one integer per axis.
        segment: integers shaped like visible, in [0, num_segments), or None.
        group_size, capacity: 0 stands for None.
    """
    visible = np.ascontiguousarray(visible)
    if segment is not None:
        segment = np.ascontiguousarray(segment, dtype=np.int32)
    axes = len(window)
    sizes = np.array([visible.shape[-axes:], window, shift], dtype=np.int32)
    images = math.prod(visible.shape[:-axes])
    counts_out = np.empty(3, dtype=np.int64)
    error = ctypes.create_string_buffer(_ERROR_BYTES)
    grouping = _group(
        _address(visible), images, axes, *map(_address, sizes), _address(segment), num_segments,
        group_size, capacity, _address(counts_out), error, _ERROR_BYTES,
    )  # fmt: skip
    if grouping is None:
        raise _thrown(error)
    try:
        groups, slots, num_tokens = counts_out.tolist()
        arrays = tuple(np.empty((images, groups, slots), dtype=np.int32) for _ in range(4))
        if not _fill(grouping, *map(_address, arrays), error, _ERROR_BYTES):
            raise _thrown(error)
    finally:
        _free(grouping)
    return *arrays, num_tokens
