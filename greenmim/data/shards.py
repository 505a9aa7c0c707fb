"""WebDataset shards: tar files, here or behind a URL, of which a process has a few open at a time.

A shard behind a URL is copied to a temporary file when it is opened, so that both kinds are read
alike: by the number of an image in its shard, in any order. The order (`sampler.shard_order`) keeps
to few shards at a time.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shutil
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import BinaryIO, NamedTuple

import numpy as np

from greenmim.data.tars import Member, Opened, images_in, read_part
from greenmim.recipe import UserError

_INFO_FILES = ("_info.json", "info.json")
_MOST_OPEN = 32
_COUNTING_THREADS = 8
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:")


class Shard(NamedTuple):
    """An open shard and its images, one for each sample."""

    file: BinaryIO
    images: list[Member]


class Shards:
    """The images of shards, by their number.

    Args:
        root: What was asked for.
        urls: The shards.
        lengths: int64 [number of shards], images of each.
        assumed: The lengths are a guess: numbers beyond a shard's end start again at its beginning.
    """

    def __init__(self, root: str, urls: list[str], lengths: np.ndarray, assumed: bool) -> None:
        self.root, self.urls, self.shards, self.assumed = root, urls, lengths, assumed
        self._ends = np.cumsum(lengths)
        # To another shard, and with time to every image.
        self._stride = int(lengths.max())
        while math.gcd(self._stride, len(self)) != 1:
            self._stride += 1
        self._opened = Opened(self._open_shard, _MOST_OPEN)

    def _open_shard(self, number: int) -> Shard:
        return open_shard(self.urls[number])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def stand_in(self, index: int, step: int) -> int:
        """From the next shard: if one image cannot be read, its whole shard may be lost."""
        return (index + step * self._stride) % len(self)

    def some(self, count: int) -> list[int]:
        """The first ones: they are in one shard."""
        return list(range(min(count, len(self))))

    def path(self, index: int) -> str:
        """shard/name; the image's number where the shard cannot be read, or not at once."""
        shard, number = self._place(index)
        url, name = self.urls[shard], str(number)
        if _is_file(url) or shard in self._opened:
            with contextlib.suppress(Exception):
                name = self._image(shard, number)[1].name
        return f"{url}/{name}"

    def open(self, index: int) -> io.BytesIO:
        file, image = self._image(*self._place(index))
        return io.BytesIO(read_part(file, image.offset, image.size))

    def _place(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, int(index - self._ends[shard] + self.shards[shard])

    def _image(self, shard: int, number: int) -> tuple[BinaryIO, Member]:
        file, images = self._opened[shard]
        if self.assumed:
            number %= len(images)
        if number >= len(images):
            raise OSError(f"the shard holds {len(images)} images, not {self.shards[shard]}")
        return file, images[number]


def find_shards(root: str, pattern: str, num_samples: int | None) -> Shards:
    """Shards from a folder of them, or a path or URL in WebDataset's notation.

    Their lengths are taken from an info file beside them, in timm's form; else they are counted.

    Args:
        root: What was asked for.
        pattern: Such as /data/train-{0000..1281}.tar; of a folder, the training split of its info
            file, or all its tars.
        num_samples: Images in all; takes the place of info file and counting.

    Raises:
        UserError: there are none, they cannot be counted, or webdataset is missing.
    """
    try:
        import webdataset
    except ImportError as error:
        raise UserError(
            f"--data.root {root} needs the package webdataset: pip install 'greenmim[data]'."
        ) from error
    folder = pattern if os.path.isdir(pattern) else os.path.dirname(pattern)
    known = _known_lengths(root, folder)
    if os.path.isdir(pattern):
        urls = sorted(known or (f for f in os.listdir(pattern) if f.endswith(".tar")))
        urls = [os.path.join(pattern, name) for name in urls]
    else:
        urls = _expanded(root, pattern, webdataset)
    missing = [url for url in urls if _is_file(url) and not os.path.isfile(url)]
    if missing or not urls:
        raise UserError(
            f"--data.root {root}: there is no shard {(missing or [pattern + '/*.tar'])[0]}."
        )
    lengths = [known.get(os.path.basename(url)) for url in urls]
    if num_samples is not None:
        share, rest = divmod(num_samples, len(urls))
        lengths = [share + (number < rest) for number in range(len(urls))]
    elif None in lengths:
        lengths = _counted(root, urls)
    if not sum(lengths):
        raise UserError(f"--data.root {root}: there is no image in the shards.")
    return Shards(root, urls, np.array(lengths, dtype=np.int64), assumed=num_samples is not None)


def open_shard(url: str) -> Shard:
    """Open a shard and find its images; of one that was cut short, those that are left.

    Raises:
        OSError: there is no image in it, or it cannot be read.
    """
    if _is_file(url):
        file = open(url, "rb")
    else:
        import webdataset

        file = tempfile.TemporaryFile(prefix="greenmim-shard-")
        with webdataset.gopen(url) as stream:
            shutil.copyfileobj(stream, file, 2**20)
        file.seek(0)
    images: dict[str, Member] = {}
    reason = "there is no image in it"
    try:
        for image in images_in(file):
            folder, base = os.path.split(image.name)
            # WebDataset's key; of a sample with several images, 1.jpg and 1.seg.png, the plain one.
            key, _, kind = base.partition(".")
            if "." not in kind:
                images.setdefault(os.path.join(folder, key), image)
    except tarfile.TarError as error:
        reason = f"it is no tar file, a compressed or a damaged one ({error})"
    if not images:
        raise OSError(f"{url}: {reason}")
    return Shard(file, list(images.values()))


def _is_file(url: str) -> bool:
    return _SCHEME.match(url) is None


def _expanded(root: str, pattern: str, webdataset: ModuleType) -> list[str]:
    try:
        return webdataset.shardlists.expand_urls(pattern)
    except Exception as error:
        raise UserError(f"--data.root {root} is no list of shards: {error}.") from error


def _known_lengths(root: str, folder: str) -> dict[str, int]:
    """Images of the shards of the training split by the shards' names, from an info file."""
    for name in _INFO_FILES:
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            continue
        try:
            with open(path) as file:
                split = json.load(file)["splits"]["train"]
            return dict(zip(split["filenames"], map(int, split["shard_lengths"]), strict=True))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--data.root {root}: {path} has no splits.train with filenames and shard_lengths"
                f" ({error!r}); put it right or take it away."
            ) from error
    return {}


def _counted(root: str, urls: list[str]) -> list[int]:
    if not all(map(_is_file, urls)):
        raise UserError(
            f"--data.root {root}: shards behind a URL are not counted; pass --data.num-samples."
        )

    def count(url: str) -> int:
        shard = open_shard(url)
        shard.file.close()
        return len(shard.images)

    try:
        with ThreadPoolExecutor(_COUNTING_THREADS) as threads:
            return list(threads.map(count, urls))
    except OSError as error:
        raise UserError(f"--data.root {root}: {error}.") from error
