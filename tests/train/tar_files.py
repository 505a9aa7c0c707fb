"""Generated pictures in tars and shards."""

from __future__ import annotations

import io
import tarfile
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


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


ALL = {name_of(number): encoded(number) for number in range(12)}


def source_of(root: str, **data) -> Source:
    return find_source(DataConfig(root=root, **data))


def read(source: Source, index: int) -> bytes:
    file = source.open(index)
    return Path(file).read_bytes() if isinstance(file, str) else file.read()
