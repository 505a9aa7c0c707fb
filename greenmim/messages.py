"""What an error says, as part of a sentence of ours; its type's name where it says nothing."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """Its first line alone: of libraries that add a trace, or advice for their own users."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def one_line(error: BaseException) -> str:
    """All of it, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
