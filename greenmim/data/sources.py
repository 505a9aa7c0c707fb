"""Where images come from: a folder, tar files, WebDataset shards, a Hugging Face dataset.

`--data.root` names them as timm's `create_dataset` does, by a prefix; without one it is a folder,
or a tar file. All are looked up by index: so order, crops, masks and resume are as exact for shards
as for a folder. timm's readers are not used: the one for tars keeps Python objects for every image
in every loader process, the one for shards shuffles by the number of processes and workers, and
those of datasets want labels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import io
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from greenmim.data.images import (
    REST_IS_USED,
    Folder,
    Names,
    Source,
    Unavailable,
    first_folder,
    hopeless,
    ignored_note,
    is_image,
    kind_of,
    no_image,
)
from greenmim.data.sampler import WINDOW
from greenmim.data.tars import DamagedTar, Member, Opened, members_in, read_part
from greenmim.guards import UserError, one_line
from greenmim.messages import dashes
from greenmim.recipe import ImagesConfig

PREFIXES = ("tar/", "wds/", "hfds/")
# Of timm's prefixes, those that are something else than a place in the file system.
_NOT_SUPPORTED = ("hfids", "tfds", "torch")
_MOST_OPEN_TARS, _MOST_OPEN_SHARDS = 64, 256
_INFO_FILES = ("_info.json", "info.json")
_WITH_INFO_FILES = ("http:", "https:", "file:")  # URLs, beside which another file can be asked for
_COUNTING_THREADS = 8
_MOST_IMAGES = 2**40  # of a shard: sums of them are int64
# Splits of an info file, by the option that names it; training images are of the first there is.
_SPLITS = {"val_root": ("validation", "val", "test", "train")}
_META = re.compile("__[^/]*__($|/)")  # which WebDataset keeps for itself
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:")


def find_source(config: ImagesConfig, option: str = "data.root") -> Source:
    """What `--data.root` names, or another option: `data.val_root`.

    Raises:
        UserError: there is no such thing, or no image in it, or a package is missing.
    """
    name = option.rpartition(".")[2]
    if name != "root":
        config = dataclasses.replace(config, root=getattr(config, name), num_samples=None)
    root = config.root
    assert root is not None  # or it was told before
    try:
        return _find_source(root, config.num_samples, _SPLITS.get(name, ("train",)))
    except OSError as error:
        problem = _error(root, f"it cannot be read: {one_line(error)}")
        raise _of_option(problem, root, option) from error
    except UserError as error:
        raise _of_option(error, root, option) from error


def _of_option(error: UserError, root: str, option: str) -> UserError:
    if option == "data.root":
        return error
    text = str(error).removeprefix(f"--data.root {root}: ")
    # That option is of the other images.
    text = text.replace("pass --data.num-samples", "put their info file beside them")
    return UserError(f"{dashes(option)} {root}: {text}")


def _find_source(root: str, num_samples: int | None, splits: Sequence[str]) -> Source:
    prefix, slash, rest = root.partition("/")
    prefix = prefix.lower() if slash and not os.path.isdir(root) else ""
    if num_samples is not None and prefix != "wds":
        raise UserError("--data.num-samples goes with shards (--data.root wds/...) alone.")
    if prefix == "hfds":
        return HuggingFace(root, rest)
    if prefix in _NOT_SUPPORTED:
        raise _error(root, f"there is no reader for {prefix}/; take a folder, tar/, wds/ or hfds/")
    if prefix == "tar":
        return Tars(root, rest)
    if prefix == "wds":
        return find_shards(root, rest, num_samples, splits)
    if root.lower().endswith(".tar") and not os.path.isdir(root):
        return Tars(root, root)
    return Folder(root)


def _error(root: str, text: str) -> UserError:
    return UserError(f"--data.root {root}: {text}.")


class Tars(Source):
    """The images in a tar file, or in the tar files of a folder; in tars in tars, too.

    Arrays instead of a list of members, so that loader processes share their memory.
    """

    def __init__(self, root: str, path: str) -> None:
        self.root = root
        if not os.path.exists(path):
            raise _error(root, f"there is no tar file or folder {path}")
        tars = filter(os.path.isfile, sorted(glob.glob(f"{glob.escape(path)}/*.tar")))
        self.tars = [path] if os.path.isfile(path) else list(tars)
        self._ignored: Counter[str] = Counter()
        found = []
        for number, name in enumerate(self.tars):
            try:
                with open(name, "rb") as file:
                    for member in members_in(file, ignored=self._ignored):
                        if is_image(member.name):
                            found.append((os.fsencode(member.name), number, *member[1:]))
                        else:
                            self._ignored[kind_of(member.name)] += 1
            except DamagedTar as error:
                raise _error(root, f"{name}: {error}; make it anew, without compression") from error
        if not found:
            none = (
                no_image("it", self.notes()) if self.tars else "there is no tar file (*.tar) in it"
            )
            raise _error(root, none)
        names, files, offsets, sizes = zip(*found, strict=True)
        self.names = Names(names)
        self.file_of = np.array(files, dtype=np.int32)
        self.offsets_and_sizes = np.array([offsets, sizes], dtype=np.int64).T
        self._opened = Opened(self._open_tar, _MOST_OPEN_TARS)
        # What the names of all that is in folders have in common says nothing of a class.
        inside = [name for name in map(os.fsdecode, names) if "/" in name]
        shared = os.path.commonprefix(inside)
        self._above_classes = shared.rpartition("/")[0] + "/" if "/" in shared else ""
        self._named_by_tar = len(self.tars) > 1 and not inside

    def _open_tar(self, number: int) -> BinaryIO:
        return open(self.tars[number], "rb")

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        return os.path.join(self.tars[self.file_of[index]], self.names[index])

    def open(self, index: int) -> io.BytesIO:
        offset, size = self.offsets_and_sizes[index].tolist()
        file = int(self.file_of[index])
        return io.BytesIO(self._opened.use(file, lambda opened: read_part(opened, offset, size)))

    def label(self, index: int) -> str | None:
        """Its folder below what all have in common; of several tars without folders its tar."""
        name = first_folder(self.names[index].removeprefix(self._above_classes))
        if self._named_by_tar:
            name = os.path.basename(self.tars[self.file_of[index]])
        return re.sub(r"\.tar$", "", name, flags=re.IGNORECASE) if name else None

    def files(self) -> Iterator[str]:
        return iter(self.tars)

    def notes(self) -> list[str]:
        return ignored_note(self.root, self._ignored)


class HuggingFace(Source):
    """A dataset of the Hugging Face hub, or of a folder in their form: NAME, or NAME:SPLIT."""

    def __init__(self, root: str, name: str) -> None:
        self.root = root
        self.name, _, split = (name, "", "") if os.path.exists(name) else name.partition(":")
        self.split = split or "train"
        try:
            self._length = len(self._data)
        except ImportError as error:
            raise _error(root, "it needs the package datasets: pip install datasets") from error
        except Exception as error:  # its own, the network's, the file system's
            raise _error(root, f"it cannot be loaded: {one_line(error)}") from error
        if not self._length:
            raise _error(root, "there is no image in it")

    @functools.cached_property
    def _data(self) -> Any:
        return self._load()

    def _load(self) -> Any:
        """The first columns of images, not decoded, and of classes, if there is one; no others."""
        import datasets

        data = datasets.load_dataset(self.name, split=self.split)
        images, classes = (
            [name for name, feature in data.features.items() if isinstance(feature, kind)]
            for kind in (datasets.Image, datasets.ClassLabel)
        )
        if not images:
            raise ValueError(f"none of its columns ({', '.join(data.features)}) holds images.")
        self._image, self._class = images[0], next(iter(classes), None)
        data = data.select_columns([*images[:1], *classes[:1]])
        return data.cast_column(self._image, datasets.Image(decode=False))

    @functools.cached_property
    def _classes(self) -> Any:
        """The column of classes alone: a row of all columns reads the image, too."""
        return self._data.select_columns([self._class])

    def __getstate__(self) -> dict:
        # Another process, perhaps elsewhere, loads it from its own cache; a fork shares the map.
        rows = ("_data", "_classes")
        return {name: value for name, value in self.__dict__.items() if name not in rows}

    def __len__(self) -> int:
        return self._length

    def path(self, index: int) -> str:
        return f"{self.root}/{index}"

    def open(self, index: int) -> str | io.BytesIO:
        image = self._data[int(index)][self._image]
        if image is None:
            raise OSError("the row has no image")
        return image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])

    def label(self, index: int) -> str | None:
        """That of the first column of classes."""
        number = None if self._class is None else self._classes[int(index)][self._class]
        if number is None or number < 0:  # as they say that there is none
            return None
        return self._data.features[self._class].int2str(number)

    def labels(self) -> list[str | None]:
        if self._class is None:
            return [None] * len(self)
        names = self._data.features[self._class].names
        numbers = self._classes[self._class]
        return [None if number is None or number < 0 else names[number] for number in numbers]

    def classes(self) -> list[str]:
        """Those of the column, in its order."""
        return list(self._data.features[self._class].names) if self._class else []

    def files(self) -> Iterator[str]:
        return iter((self.name, self.split, str(self._data._fingerprint)))


class Shard(NamedTuple):
    """An open shard and its images, one for each sample, with what holds their classes.

    What else is in it is counted by kind; `damage` says how it is damaged, if it is.
    """

    file: BinaryIO
    images: list[Member]
    labels: list[Member | None]
    ignored: Counter[str]
    damage: str | None


class Shards(Source):
    """The images of WebDataset shards: tar files, here or behind a URL.

    A shard behind a URL is copied to a temporary file when it is opened, so that both kinds are
    read alike: by the number of an image in its shard, in any order. The order (see
    `sampler.shard_order`) keeps to few shards at a time, and no more are open than are in use.

    Args:
        lengths: int64 [number of shards], images of each.
        assumed: The lengths are a guess. Each pass begins where the one before ended in a shard,
            round and round: so all images of a longer one are seen in time, and those of a shorter
            one more than once in a pass.
        seen: What people should know of the shards; None where they were not looked at yet.
    """

    knows_labels = False
    shards: np.ndarray

    def __init__(
        self,
        root: str,
        urls: list[str],
        lengths: np.ndarray,
        assumed: bool,
        seen: list[str] | None = None,
    ) -> None:
        self.root, self.urls, self.shards, self.assumed = root, urls, lengths, assumed
        self._seen = seen
        self._damaged: list[tuple[str, str]] = []
        self._ends = np.cumsum(lengths)
        # To another shard, and with time to every image.
        self._stride = int(lengths.max())
        while math.gcd(self._stride, len(self)) != 1:
            self._stride += 1
        self._opened = Opened(self._open_shard, most=1)
        self.expect(1)

    def _open_shard(self, number: int) -> Shard:
        shard = open_shard(self.urls[number])
        if shard.damage and self._seen is None:
            self._damaged.append((self.urls[number], f"{shard.damage}; {REST_IS_USED}"))
        return shard

    def take_damaged(self) -> list[tuple[str, str]]:
        taken, self._damaged = self._damaged, []
        return taken

    def __len__(self) -> int:
        return int(self._ends[-1])

    def expect(self, readers: int) -> None:
        # A window of the order lies in so many shards at most.
        shortest_first = np.sort(self.shards[self.shards > 0])
        of_a_reader = 2 + int((np.cumsum(shortest_first) < WINDOW - 1).sum())
        # One more, which takes the place of an image that cannot be read.
        self._opened.most = min(readers * of_a_reader + 1, _MOST_OPEN_SHARDS)

    def at(self, position: int, turn: int) -> int:
        return position + turn * len(self) if self.assumed else position

    def stand_in(self, index: int, attempt: int) -> int:
        """From the next shard: if one image cannot be read, its whole shard may be lost."""
        turn, position = divmod(index, len(self))
        return turn * len(self) + (position + attempt * self._stride) % len(self)

    def some(self, count: int) -> list[int]:
        """The first ones: they are in one shard."""
        return list(range(min(count, len(self))))

    def path(self, index: int) -> str:
        """shard/name; the image's number where the shard cannot be read, or not at once."""
        shard, number = self._find(index)
        url, name = self.urls[shard], str(number % self.shards[shard])
        if _is_file(url) or shard in self._opened:
            with contextlib.suppress(Exception):
                opened = self._opened[shard]
                name = opened.images[self._place(opened, shard, number)].name
        return f"{url}/{name}"

    def open(self, index: int) -> io.BytesIO:
        shard, number = self._find(index)

        def read(opened: Shard) -> bytes:
            return _read_member(opened, opened.images[self._place(opened, shard, number)])

        return io.BytesIO(self._opened.use(shard, read))

    def label(self, index: int) -> str | None:
        """What its .cls says."""
        shard, number = self._find(index)

        def read(opened: Shard) -> bytes:
            label = opened.labels[self._place(opened, shard, number)]
            return b"" if label is None else _read_member(opened, label)

        return self._opened.use(shard, read).decode(errors="backslashreplace").strip() or None

    def labels(self) -> None:
        """Nobody knows before all shards are read."""

    def files(self) -> Iterator[str]:
        return iter(self.urls)

    def notes(self) -> list[str]:
        if self._seen is not None:
            return self._seen
        if 0 not in self._opened:
            return []
        first, taken = self._opened[0], int(self.shards[0])
        notes = _shards_note(f"{self.urls[0]}, one of {len(self.urls)}", first.ignored)
        if self.assumed and len(first.images) != taken:
            notes.append(
                f"{self.urls[0]} holds {len(first.images)} images, where an even share of"
                f" --data.num-samples is {taken}: each epoch takes {taken} of them, the next ones"
                " in turn"
            )
        return notes

    def _find(self, index: int) -> tuple[int, int]:
        """Shard and number in it, which goes on counting in later passes."""
        turn, position = divmod(index, len(self))
        shard = int(np.searchsorted(self._ends, position, side="right"))
        return shard, int(position - self._ends[shard] + (1 + turn) * self.shards[shard])

    def _place(self, opened: Shard, shard: int, number: int) -> int:
        """Of an image among those of its shard; OSError where it has not so many."""
        count = len(opened.images)
        if self.assumed:
            number %= count
        if number >= count:
            why = f"; {opened.damage}" if opened.damage else ""
            raise OSError(f"the shard holds {count} images, not {self.shards[shard]}{why}")
        return number


def _read_member(shard: Shard, member: Member) -> bytes:
    return read_part(shard.file, member.offset, member.size)


def find_shards(
    root: str, pattern: str, num_samples: int | None, splits: Sequence[str] = ("train",)
) -> Shards:
    """Shards from a folder of them, or a path or URL in WebDataset's notation.

    Of a folder, the first of `splits` in its info file, in timm's form, or all its tars. Images are
    `num_samples` in all, else as many as the info file says, else counted.
    """
    try:
        import webdataset
    except ImportError as error:
        raise _error(
            root, "it needs the package webdataset: pip install 'greenmim[data]'"
        ) from error
    is_folder = os.path.isdir(pattern)
    # A stated number needs no file, which may be far away.
    chosen: list[str] = []
    known: dict[str, int] = {}
    if num_samples is None or is_folder:
        folder = pattern if is_folder else os.path.dirname(pattern)
        chosen, known = _known_lengths(root, folder, splits if is_folder else ())
    if is_folder:
        names = sorted(chosen or (f for f in os.listdir(pattern) if f.endswith(".tar")))
        urls = [os.path.join(pattern, name) for name in names]
    else:
        try:
            urls = webdataset.shardlists.expand_urls(pattern)
        except Exception as error:
            raise _error(root, f"it is no list of shards: {error}") from error
    missing = [url for url in urls if _is_file(url) and not os.path.isfile(url)]
    if missing or not urls:
        raise _error(root, f"there is no shard {(missing or [pattern + '/*.tar'])[0]}")
    lengths: list[Any] = [known.get(os.path.basename(url)) for url in urls]
    seen = None
    if num_samples is not None:
        share, rest = divmod(num_samples, len(urls))
        lengths = [share + (number < rest) for number in range(len(urls))]
    elif None in lengths:
        lengths, seen = _counted(root, urls)
    if not sum(lengths):
        raise _error(root, "there is no image in the shards")
    return Shards(root, urls, np.array(lengths, np.int64), num_samples is not None, seen)


def open_shard(url: str) -> Shard:
    """Open a shard and find its images; of one that was cut short, those that are left.

    Raises:
        OSError: there is no image in it, or it cannot be read; Unavailable, or fetched.
    """
    file = open(url, "rb") if _is_file(url) else _fetched(url)
    members: list[Member] = []
    ignored: Counter[str] = Counter()
    damage = None
    try:
        try:
            for member in members_in(file, ignored=ignored):
                members.append(member)
        except DamagedTar as error:
            damage = str(error)
        samples = list(of_samples(members, ignored))
        if damage and samples and "." in _field(samples[-1][0]):
            samples.pop()  # it may have had a plain one
        images = [image for image, _ in samples]
        if not images:
            raise OSError(f"{url}: {damage or no_image('it', _shards_note('it', ignored))}")
    except BaseException:
        file.close()  # of a temporary file, the space
        raise
    return Shard(file, images, [label for _, label in samples], ignored, damage)


def of_samples(
    members: Iterable[Member], ignored: Counter[str]
) -> Iterator[tuple[Member, Member | None]]:
    """Image and class of each sample, as WebDataset's own library cuts samples (`group_by_keys`).

    A sample is neighbours whose names are the same up to the first dot of the last part. Of several
    images in it, 1.jpg and 1.seg.png, the plain one is taken; where none is plain, as of 1.left.jpg
    and 1.right.jpg, none. The class is in 1.cls, if there is one. All else is counted in `ignored`
    by what follows that dot.
    """
    data = []
    for member in members:
        if not _META.match(member.name):
            if _field(member):
                data.append(member)
            else:
                ignored[kind_of(member.name)] += 1
    for _, members_of_one in itertools.groupby(data, lambda m: m.name[: -len(_field(m))]):
        sample = list(members_of_one)
        fields: dict[str, Member] = {}  # of duplicate names the first; webdataset raises
        for member in sample:
            fields.setdefault(_field(member).lower(), member)
        images = [member for member in fields.values() if is_image(member.name)]
        plain = [member for member in images if "." not in _field(member)]
        chosen = (plain or images)[0] if plain or len(images) == 1 else None
        label = fields.get("cls")
        others = (member for member in sample if member is not chosen and member is not label)
        ignored.update(f".{_field(member)}".lower() for member in others)
        if chosen is not None:
            yield chosen, label


def _field(member: Member) -> str:
    """What WebDataset calls a file of a sample."""
    return os.path.basename(member.name).partition(".")[2]


def _shards_note(where: str, ignored: Counter[str]) -> list[str]:
    if not any(is_image(f"KEY{kind}") for kind in ignored):
        return ignored_note(where, ignored)
    advice = (
        ". A WebDataset sample is files of one name up to its first dot: KEY.jpg is read of it, or"
        " its only image. --data.root tar/FOLDER reads all images of local files"
    )
    return [note + advice for note in ignored_note(where, ignored)]


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
        raise Unavailable(f"{url} cannot be fetched: {one_line(error)}") from None
    file.seek(0)
    return file


def _is_file(url: str) -> bool:
    return _SCHEME.match(url) is None


def _known_lengths(
    root: str, folder: str, wanted: Sequence[str]
) -> tuple[list[str], dict[str, int]]:
    """From an info file: the shards of the first wanted split, or of the only one there is, and
    images of the shards of all splits by the shards' names; nothing where there is no such file.

    Where none is wanted, one that can be read will do.
    """
    for name in _INFO_FILES:
        path = os.path.join(folder, name)
        text = _text_of(path)
        if text is None:
            continue
        split = "train"
        try:
            content = json.loads(text)
            if not isinstance(content, dict) or "splits" not in content:  # of something else
                continue
            splits = dict(content["splits"])
            known = {}
            for other, facts in splits.items():
                with contextlib.suppress(*_NO_SPLIT):  # it may say less of this one
                    known[other] = _lengths_of(facts)
            only = next(iter(splits)) if len(splits) == 1 else split
            split = next((name for name in wanted if name in splits), only)
            if wanted or not known:
                known |= {split: _lengths_of(splits[split])}
            chosen = known.get(split, {})
            # Its own last, should two splits name a shard alike.
            parts = [*known.values(), chosen]
            return list(chosen), {name: length for part in parts for name, length in part.items()}
        except _NO_SPLIT as error:
            why = f"{type(error).__name__}: {one_line(error)[:200]}"
            what = f"{path} has no splits.{split} with filenames and shard_lengths ({why})"
            raise _error(root, f"{what}; put it right or take it away") from error
    return [], {}


_NO_SPLIT = (ValueError, LookupError, TypeError, OverflowError, RecursionError)


def _lengths_of(split: Any) -> dict[str, int]:
    """Images of the shards of a split by the shards' names; one of `_NO_SPLIT` on a bad one."""
    known = dict(zip(split["filenames"], map(int, split["shard_lengths"]), strict=True))
    if not all(isinstance(name, str) and 0 <= known[name] < _MOST_IMAGES for name in known):
        raise ValueError("a name is no text, or a length no number of images")
    return known


def _text_of(path: str) -> bytes | None:
    """What is in a file or behind a URL; None where there is none."""
    if _is_file(path):
        return pathlib.Path(path).read_bytes() if os.path.isfile(path) else None
    if not path.lower().startswith(_WITH_INFO_FILES):
        return None
    import webdataset

    with contextlib.suppress(OSError), webdataset.gopen(path) as stream:  # curl's, if there is none
        return stream.read()
    return None


def _counted(root: str, urls: list[str]) -> tuple[list[int], list[str]]:
    """Images of each shard, and what people should know of the shards."""
    if not all(map(_is_file, urls)):
        what = "shards behind a URL are not counted, and no _info.json beside them could be read"
        raise _error(root, f"{what}; pass --data.num-samples")

    def look(url: str) -> tuple[int, Counter[str], str | None]:
        shard = open_shard(url)
        shard.file.close()
        return len(shard.images), shard.ignored, shard.damage

    try:
        with ThreadPoolExecutor(_COUNTING_THREADS) as threads:
            lengths, ignored, damage = zip(*threads.map(look, urls), strict=True)
    except OSError as error:
        raise _error(root, str(error)) from error
    notes = [
        f"{url}: {why}; the {length} images that are left are used"
        for url, length, why in zip(urls, lengths, damage, strict=True)
        if why
    ]
    return list(lengths), [*notes, *_shards_note(root, sum(ignored, Counter()))]
