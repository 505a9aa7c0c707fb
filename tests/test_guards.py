"""What is said of an error, also of one without words or with many lines."""

from __future__ import annotations

import pytest

from greenmim.guards import first_line, one_line


@pytest.mark.parametrize("error", [RuntimeError(), RuntimeError("\n  \n")])
def test_an_error_without_words_is_told_by_its_type(error):
    assert first_line(error) == one_line(error) == "RuntimeError"


def test_an_error_of_several_lines_becomes_one():
    error = ValueError("\n no room\n  in /dev/shm\n")
    assert first_line(error) == "no room"
    assert one_line(error) == "no room in /dev/shm"
