"""Where the compiled modules are. A build for the Hugging Face Hub replaces this file."""

from __future__ import annotations

import pathlib


def library_file(name: str) -> pathlib.Path | None:
    """The file of ``_C``, ``_C_cuda`` or ``_C_partition``; None if it was not built."""
    files = pathlib.Path(__file__).parent.glob(f"{name}.*so")
    return min(files, default=None)  # one of the stable ABI before what an older build left
