"""What the C library does with the memory that a training step on a CPU frees."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX = 128 * 1024, 65536


def keep_freed_memory() -> None:
    """Let the process keep freed memory for what it allocates next; for the rest of its life.

    By default glibc gives large tensors back to the system as they are freed, and every step takes
    them anew as tens of thousands of pages, each cleared by the system at its first touch: a tenth
    of a step of Swin-B. Other C libraries are left as they are.
    """
    # All from the heap, which never shrinks.
    _set(mmap_max=0, trim_threshold=-1)


def give_back_freed_memory() -> None:
    """Undo `keep_freed_memory`, also in a child that took it over: glibc's defaults."""
    _set(_DEFAULT_MMAP_MAX, _DEFAULT_TRIM_THRESHOLD)


def _set(mmap_max: int, trim_threshold: int) -> None:
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, mmap_max)
        libc.mallopt(_M_TRIM_THRESHOLD, trim_threshold)
