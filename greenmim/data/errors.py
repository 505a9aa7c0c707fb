"""Errors of reading: what is wrong with a file, and what with the machine."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from PIL import Image

from greenmim.messages import one_line

T = TypeVar("T")

# Seconds to wait before a file is tried again that the system had an error with.
PAUSES = (0.1, 0.5, 2.0)

# No other file would fare better.
_FULL = "a disk is full: make room, or set TMPDIR to a larger one"
_MANY = "too many files are open: raise the limit (ulimit -n), or lower --data.workers"
_MEMORY = "memory ran out: lower --data.workers or --data.batch-size"
_HOPELESS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EMFILE: _MANY,
    errno.ENFILE: _MANY,
    errno.ENOMEM: _MEMORY,
}
# Asked again at once, the system would say the same.
_DEFINITE = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}


class Unavailable(OSError):
    """A file that could not be opened, and is not tried again for a while."""


def hopeless(error: Exception) -> str | None:
    """Why no other file would fare better and what to do; None where one may."""
    if isinstance(error, OSError):
        return _HOPELESS.get(error.errno)
    # PyTorch has no class for it.
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return _MEMORY
    return None


def reason_of(error: Exception) -> str:
    """What an error says, in one line."""
    if isinstance(error, Image.DecompressionBombError):
        most = 2 * Image.MAX_IMAGE_PIXELS
        return f"it has more than the {most / 1e6:.0f} million pixels Pillow opens; make it smaller"
    return one_line(error)


def patiently(call: Callable[[], T]) -> T:
    """`call()`, a few times where the system has an error: networks have hiccups.

    Pillow's own errors are OSErrors without a number; they are of the file and come again.
    """
    for pause in PAUSES:
        try:
            return call()
        except OSError as error:
            if error.errno is None or error.errno in _DEFINITE or error.errno in _HOPELESS:
                raise
        time.sleep(pause)
    return call()
