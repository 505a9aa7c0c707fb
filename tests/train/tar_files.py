"""Generated pictures in tars and shards."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image
from train_pictures import picture

from greenmim.data.images import Source
from greenmim.data.sources import find_source
from greenmim.recipe import DataConfig


def encoded(number: int) -> bytes:
    """PNG and JPEG in turn."""
    file = io.BytesIO()
    Image.fromarray(picture(number)).save(file, ("PNG", "JPEG")[number % 2])
    return file.getvalue()


def name_of(number: int) -> str:
    return f"{number:02d}.{('png', 'jpg')[number % 2]}"


ALL = {name_of(number): encoded(number) for number in range(12)}


def source_of(root: str, **data) -> Source:
    return find_source(DataConfig(root=root, **data))


def read(source: Source, index: int) -> bytes:
    file = source.open(index)
    return Path(file).read_bytes() if isinstance(file, str) else file.read()
