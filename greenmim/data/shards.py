"""WebDataset shards: tar files, here or behind a URL, of which a process has a few open at a time.

A shard behind a URL is copied to a temporary file when it is opened, so that both kinds are read
alike: by the number of an image in its shard, in any order. The order (`sampler.shard_order`) keeps
to few shards at a time, and no more are kept than are in use.
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

from greenmim.data.errors import Unavailable, hopeless, reason_of
from greenmim.data.sampler import WINDOW
from greenmim.data.tars import Member, Opened, images_in, read_part
from greenmim.recipe import UserError

_INFO_FILES = ("_info.json", "info.json")
_WITH_INFO_FILES = ("http:", "https:", "file:")  # URLs, beside which another file can be asked for
_MOST_OPEN = 256
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
        assumed: The lengths are a guess. Each pass begins where the one before ended in a shard,
            round and round: so all images of a longer one are seen in time, and those of a shorter
            one more than once in a pass.
    """

    def __init__(self, root: str, urls: list[str], lengths: np.ndarray, assumed: bool) -> None:
        self.root, self.urls, self.shards, self.assumed = root, urls, lengths, assumed
        self._ends = np.cumsum(lengths)
        # To another shard, and with time to every image.
        self._stride = int(lengths.max())
        while math.gcd(self._stride, len(self)) != 1:
            self._stride += 1
        self._opened = Opened(self._open_shard, most=1)
        self.expect(1)

    def _open_shard(self, number: int) -> Shard:
        return open_shard(self.urls[number])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def expect(self, places: int) -> None:
        # A window of the order lies in so many shards at most.
        shortest_first = np.sort(self.shards[self.shards > 0])
        of_a_place = 2 + int((np.cumsum(shortest_first) < WINDOW - 1).sum())
        # One more, which takes the place of an image that cannot be read.
        self._opened.most = min(places * of_a_place + 1, _MOST_OPEN)

    def at(self, position: int, turn: int) -> int:
        return position + turn * len(self) if self.assumed else position

    def stand_in(self, index: int, step: int) -> int:
        """From the next shard: if one image cannot be read, its whole shard may be lost."""
        turn, position = divmod(index, len(self))
        return turn * len(self) + (position + step * self._stride) % len(self)

    def some(self, count: int) -> list[int]:
        """The first ones: they are in one shard."""
        return list(range(min(count, len(self))))

    def path(self, index: int) -> str:
        """shard/name; the image's number where the shard cannot be read, or not at once."""
        shard, number = self._place(index)
        url, name = self.urls[shard], str(number % self.shards[shard])
        if _is_file(url) or shard in self._opened:
            with contextlib.suppress(Exception):
                name = self._image(self._opened[shard], shard, number).name
        return f"{url}/{name}"

    def open(self, index: int) -> io.BytesIO:
        shard, number = self._place(index)

        def read(opened: Shard) -> bytes:
            image = self._image(opened, shard, number)
            return read_part(opened.file, image.offset, image.size)

        return io.BytesIO(self._opened.use(shard, read))

    def notes(self) -> list[str]:
        if not self.assumed or 0 not in self._opened:
            return []
        found, taken = len(self._opened[0].images), int(self.shards[0])
        if found == taken:
            return []
        return [
            f"{self.urls[0]} holds {found} images, where an even share of --data.num-samples is"
            f" {taken}: each epoch takes {taken} of them, the next ones in turn"
        ]

    def _place(self, index: int) -> tuple[int, int]:
        """Shard and number in it, which goes on counting in later passes."""
        turn, position = divmod(index, len(self))
        shard = int(np.searchsorted(self._ends, position, side="right"))
        return shard, int(position - self._ends[shard] + (1 + turn) * self.shards[shard])

    def _image(self, opened: Shard, shard: int, number: int) -> Member:
        images = opened.images
        if self.assumed:
            number %= len(images)
        if number >= len(images):
            raise OSError(f"the shard holds {len(images)} images, not {self.shards[shard]}")
        return images[number]


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
    # A stated number needs no file, which may be far away.
    known = _known_lengths(root, folder) if num_samples is None or folder == pattern else {}
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
        Unavailable: it cannot be fetched.
        OSError: there is no image in it, or it cannot be read.
    """
    file = open(url, "rb") if _is_file(url) else _fetched(url)
    try:
        images, reason = _samples(file)
        if not images:
            raise OSError(f"{url}: {reason}")
    except BaseException:
        file.close()  # of a temporary file, the space
        raise
    return Shard(file, images)


def _fetched(url: str) -> BinaryIO:
    """A temporary copy."""
    import webdataset

    file = tempfile.TemporaryFile(prefix="greenmim-shard-")
    try:
        with webdataset.gopen(url) as stream:
            shutil.copyfileobj(stream, file, 2**20)
    except Exception as error:
        file.close()
        if hopeless(error):
            raise
        # Not tried again at once: curl has done so already.
        raise Unavailable(f"{url} cannot be fetched: {reason_of(error)}") from None
    file.seek(0)
    return file


def _samples(file: BinaryIO) -> tuple[list[Member], str]:
    """The image of each sample, and why there is none."""
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
    return list(images.values()), reason


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
        text = _text_of(path)
        if text is None:
            continue
        try:
            split = json.loads(text)["splits"]["train"]
            return dict(zip(split["filenames"], map(int, split["shard_lengths"]), strict=True))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--data.root {root}: {path} has no splits.train with filenames and shard_lengths"
                f" ({error!r}); put it right or take it away."
            ) from error
    return {}


def _text_of(path: str) -> bytes | None:
    """What is in a file or behind a URL; None where there is none."""
    if _is_file(path):
        if not os.path.isfile(path):
            return None
        with open(path, "rb") as file:
            return file.read()
    if not path.lower().startswith(_WITH_INFO_FILES):
        return None
    import webdataset

    try:
        with webdataset.gopen(path) as stream:
            return stream.read()
    except OSError:  # curl's, if there is no such file
        return None


def _counted(root: str, urls: list[str]) -> list[int]:
    if not all(map(_is_file, urls)):
        raise UserError(
            f"--data.root {root}: shards behind a URL are not counted, and no _info.json beside"
            " them could be read; pass --data.num-samples."
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
