"""What an error says, as part of a sentence of ours; its type's name where it says nothing."""

from __future__ import annotations

import contextlib
import os
from typing import TextIO


def first_line(error: BaseException) -> str:
    """Its first line alone: of libraries that add a trace, or advice for their own users."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def one_line(error: BaseException) -> str:
    """All of it, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def silence(stream: TextIO) -> None:
    """Lead a stream nowhere, where nobody reads it any more or its disk is full.

    What waits to be written there would fail again at the program's end.
    """
    with contextlib.suppress(OSError, ValueError):  # no file of the system's
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
