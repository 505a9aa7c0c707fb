"""Images of a folder: finding them, and what an error of reading means."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

from greenmim.data.decode import IMAGE_SUFFIXES
from greenmim.guards import UserError

T = TypeVar("T")
_HEIF_SUFFIXES = (".heic", ".heif", ".hif")
_KINDS_NAMED = 8


class Names:
    """Names of files by their number, in two pieces of memory, which loader processes share.

    A list's strings they do not share, and there may be millions.
    """

    def __init__(self, names: Iterable[bytes]) -> None:
        names = list(names)
        self._ends = np.cumsum([0, *map(len, names)], dtype=np.int64)
        self._bytes = b"".join(names)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> str:
        return os.fsdecode(self._bytes[self._ends[number] : self._ends[number + 1]])


def is_image(name: str) -> bool:
    """Whether a file's name is that of a picture."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def kind_of(name: str) -> str:
    """What people call the kind of a file by its name."""
    return os.path.splitext(name)[1].lower() or "without a suffix"


def first_folder(name: str) -> str | None:
    """The first folder in a relative path, if it is in one."""
    folder, slash, _ = name.partition("/")
    return folder if slash else None


def ignored_note(where: str, ignored: Counter[str]) -> list[str]:
    """A note that counts by kind what is there and not read; [] without such files."""
    if not ignored:
        return []
    kinds = ignored.most_common()
    named = [f"{count} {kind}" for kind, count in kinds[:_KINDS_NAMED]]
    if rest := kinds[_KINDS_NAMED:]:
        named.append(f"{sum(count for _, count in rest)} of {len(rest)} other kinds")
    heif = any(kind in _HEIF_SUFFIXES for kind in ignored)
    advice = "; pip install pillow-heif reads HEIC" if heif else ""
    return [f"ignored in {where}: {', '.join(named)}{advice}"]


def no_image(where: str, notes: list[str]) -> str:
    """The message that there is no image in a place; `notes` say what is there."""
    there = "".join(f" ({note})" for note in notes)
    return (
        f"there is no image in {where}{there}; image files end in .jpg, .png or another suffix that"
        " Pillow reads"
    )


def find_images(root: str | Path, ignored: Counter[str] | None = None) -> Names:
    """Every image file under a folder, at any depth, as sorted paths relative to it.

    Linked folders are followed, each once. Hidden files and folders are left out, and so are pipes,
    sockets and devices, whatever their names: opening one may block for ever.

    Args:
        ignored: Counts files that are no images, by kind.

    Raises:
        UserError: no such folder, no image in it, or a folder in it cannot be listed.
    """
    root = Path(root)
    if not os.path.exists(root):
        raise UserError(f"There is no folder {root}; pass the folder with the images.")
    if not root.is_dir() and not root.is_file():
        raise UserError(f"{root} is neither an image file nor a folder; pass a folder with images.")
    if not root.is_dir():
        raise UserError(
            f"{root} is a file; pass the folder with the images, or a tar file that is not"
            " compressed."
        )
    ignored = Counter() if ignored is None else ignored
    names: list[bytes] = []
    seen: set[str] = set()
    prefix = len(os.path.join(root, ""))
    folders = [str(root)]
    while folders:
        folder = folders.pop()
        if (real := os.path.realpath(folder)) in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(
                f"The folder {folder} cannot be listed ({error.strerror}); give it permission"
                f" to be read, or take it out of {root}."
            ) from error
        inside = []
        for entry in entries:
            if entry.name.startswith("."):
                ignored["hidden"] += 1
            elif _is_folder(entry):
                inside.append(entry.path)
            elif not is_image(entry.name):
                ignored[kind_of(entry.name)] += 1
            elif _may_wait(entry):
                ignored["pipe, socket or device"] += 1
            else:
                names.append(os.fsencode(entry.path[prefix:]))
        folders += reversed(inside)
    if not names:
        told = no_image(f"{root}, at any depth", ignored_note("it", ignored))
        raise UserError(f"{told[0].upper()}{told[1:]}.")
    return Names(sorted(names))


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle, or to where we may not look: named when it is read
        return False


def _may_wait(entry: os.DirEntry) -> bool:
    """Whether to open it may wait for another program: it is there, and neither file nor folder."""
    try:
        return not entry.is_file() and os.path.exists(entry.path)
    except OSError:
        return False


# How the reason ends where a damaged file is used as far as it goes.
REST_IS_USED = "what is left is used"


class Source:
    """Images by index, from 0, read in any order unless a kind of source says otherwise.

    Attributes:
        root: What the option named.
        shards: int64 [number of shards], images of each, where reading neighbours together is
            cheaper; None otherwise.
        knows_labels: Whether labels are known before images are read (see `labels`).
    """

    root: str
    shards: np.ndarray | None = None
    knows_labels = True

    def __len__(self) -> int:
        raise NotImplementedError

    def path(self, index: int) -> str:
        """The image's name for people."""
        raise NotImplementedError

    def open(self, index: int) -> str | io.BytesIO:
        """The file's path, or its bytes; raises anything if it cannot be read."""
        raise NotImplementedError

    def label(self, index: int) -> str | None:
        """The image's class, if it has one; raises as `open`."""
        raise NotImplementedError

    def files(self) -> Iterable[str]:
        """Local files and other names that, with the files' times, identify the images."""
        raise NotImplementedError

    def expect(self, readers: int) -> None:
        """Called before reading: how many readers of the order this process serves at once."""

    def at(self, position: int, turn: int) -> int:
        """Index of the image at a position of the epoch, in pass `turn` over the data, from 0."""
        return position

    def stand_in(self, index: int, attempt: int) -> int:
        """Index of replacement `attempt` for an unreadable image; the next ones by default."""
        return (index + attempt) % len(self)

    def some(self, count: int) -> list[int]:
        """Indices of a few images to look at: evenly spaced ones."""
        count = min(count, len(self))
        return [index * len(self) // count for index in range(count)]

    def labels(self) -> list[str | None] | None:
        """The labels of all images, if no image has to be read for them; else None."""
        return [self.label(index) for index in range(len(self))]

    def classes(self) -> list[str] | None:
        """All classes in their order; None where they are not known."""
        labels = self.labels()
        return None if labels is None else sorted({label for label in labels if label is not None})

    def fingerprint(self) -> str:
        """Changes when images or labels may: place, reader, number of images, times of files."""
        place = os.path.abspath(self.root) if os.path.exists(self.root) else self.root
        shards = None if self.shards is None else self.shards.tolist()
        found = hashlib.sha256(repr((type(self).__name__, place, len(self), shards)).encode())
        for name in self.files():
            found.update(os.fsencode(name) + b"\0")
            with contextlib.suppress(OSError):  # of a URL, the name alone
                state = os.stat(name)
                found.update(f"{state.st_size} {state.st_mtime_ns}\n".encode())
        return found.hexdigest()

    def notes(self) -> list[str]:
        """Notes for people before a run, once its first image was read."""
        return []

    def take_damaged(self) -> list[tuple[str, str]]:
        """(path, reason) of damaged files that are used as far as they go; each once."""
        return []


class Folder(Source):
    """Every image file under a folder (see `find_images`)."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._ignored: Counter[str] = Counter()
        self.names = find_images(root, self._ignored)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])

    open = path

    def label(self, index: int) -> str | None:
        """The folder below the root that it is in, at whatever depth, as torchvision has it."""
        return first_folder(self.names[index])

    def files(self) -> Iterator[str]:
        return map(self.path, range(len(self)))

    def notes(self) -> list[str]:
        return ignored_note(self.root, self._ignored)


class Selected(Source):
    """Some images of another source, which is read in any order.

    Args:
        source: All of them.
        indices: int64 [images], those that are taken.
        left_out: What people should know of the others.
    """

    def __init__(self, source: Source, indices: np.ndarray, left_out: str) -> None:
        self.root, self._source, self._indices = source.root, source, indices
        self._left_out = left_out

    def __len__(self) -> int:
        return len(self._indices)

    def path(self, index: int) -> str:
        return self._source.path(int(self._indices[index]))

    def open(self, index: int) -> str | io.BytesIO:
        return self._source.open(int(self._indices[index]))

    def label(self, index: int) -> str | None:
        return self._source.label(int(self._indices[index]))

    def files(self) -> Iterable[str]:
        return self._source.files()

    def notes(self) -> list[str]:
        return [*self._source.notes(), self._left_out]


# ---- errors of reading --------------------------------------------------------------------------

# Seconds before each retry of a file with which the system had an error.
PAUSES = (0.1, 0.5, 2.0)
_FULL = "a disk is full: make room, or set TMPDIR to a larger one"
_MANY = "too many files are open: raise the limit (ulimit -n), or lower --data.workers"
_MEMORY = "memory ran out: lower --data.workers or --data.batch-size"
# Every other file would fail too.
_HOPELESS = {errno.ENOSPC: _FULL, errno.EDQUOT: _FULL, errno.ENOMEM: _MEMORY}
_HOPELESS |= {errno.EMFILE: _MANY, errno.ENFILE: _MANY}
# Trying again at once would give the same.
_DEFINITE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}
_DEFINITE |= {errno.EACCES, errno.EPERM}


class Unavailable(OSError):
    """A file that could not be opened, and is not tried again for a while."""


def hopeless(error: Exception) -> str | None:
    """Why every other file would fail too, and what to do; None otherwise."""
    if isinstance(error, OSError):
        return _HOPELESS.get(error.errno or 0)
    # PyTorch has no class for it.
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return _MEMORY
    return None


def patiently(call: Callable[[], T]) -> T:
    """Call it, with a few retries after errors of the system: networks have hiccups.

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
