"""What the C library does with the memory that a training step on a CPU frees."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from glibc's malloc.h
_DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX = 128 * 1024, 65536


def keep_freed_memory() -> None:
    """Make the process keep freed memory for later allocations, from now on.

    By default glibc returns large tensors to the system when they are freed. Each step then gets
    them anew as tens of thousands of pages, which the system clears at their first touch: a tenth
    of a step of Swin-B. Other C libraries are left as they are.
    """
    # Nothing by mmap: all comes from the heap, which then never shrinks.
    _set(mmap_max=0, trim_threshold=-1)


def return_freed_memory() -> None:
    """Undo `keep_freed_memory`, also in a child process that inherited it.

    It sets glibc's initial values; the automatic growth of its thresholds stays off.
    """
    _set(_DEFAULT_MMAP_MAX, _DEFAULT_TRIM_THRESHOLD)


def _set(mmap_max: int, trim_threshold: int) -> None:
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, mmap_max)
        libc.mallopt(_M_TRIM_THRESHOLD, trim_threshold)
