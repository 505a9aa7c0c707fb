"""Images inside of tar files: where their bytes are, and reading them there."""

from __future__ import annotations

import math
import os
import tarfile
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Generic, NamedTuple, TypeVar

from greenmim.data.images import Unavailable, hopeless, patiently
from greenmim.guards import one_line

T = TypeVar("T")
R = TypeVar("R")

# Seconds until what could not be opened is tried again: there may be thousands of images in it.
AGAIN_AFTER = 60.0
_MOST_OF_A_HEADER = 2**24
_READ_WHOLE = {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE}
_READ_WHOLE |= {tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE}


class Member(NamedTuple):
    """A file in a tar: its name, and its first byte and number of bytes in the outermost file."""

    name: str
    offset: int
    size: int


class DamagedTar(Exception):
    """What is no tar, or ends before its end; what was found before is good."""


class _Header(tarfile.TarInfo):
    """tarfile's, which reads a long name or extended header whole, whatever its size."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: Any, errors: Any) -> Any:
        header: Any = super().frombuf(buf, encoding, errors)
        most = _MOST_OF_A_HEADER if header.type in _READ_WHOLE else math.inf
        if not 0 <= header.size <= most:
            raise tarfile.ReadError(f"a header claims {header.size} bytes")
        return header


def members_in(
    file: BinaryIO, prefix: str = "", ignored: Counter[str] | None = None
) -> Iterator[Member]:
    """The files in a tar, and in tars in it, in the order they are stored.

    Hidden files and those in hidden folders are left out, and links, and sparse files, which no
    image is.

    Args:
        ignored: Counts what is hidden and the links.

    Raises:
        DamagedTar: it is no tar, a compressed one, or damaged: cut short, wherever, or overwritten.
    """
    what = prefix.removesuffix("/") or "it"
    ignored = Counter() if ignored is None else ignored
    try:
        archive = tarfile.open(fileobj=file, mode="r:", tarinfo=_Header)
    except tarfile.TarError as error:
        raise DamagedTar(f"{what} is no tar file, or a compressed one ({error})") from error
    end, count = file.seek(0, os.SEEK_END), 0
    try:
        with archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # or it keeps them all
                if member.offset_data + member.size > end and not member.issparse():
                    raise tarfile.ReadError("unexpected end of data")
                if member.size < 0:  # as an extended header says; it would go round for ever
                    raise tarfile.ReadError(f"a header claims {member.size} bytes")
                if member.islnk() or member.issym():
                    ignored["link"] += 1
                if not member.isreg() or member.issparse():
                    continue
                parts = member.name.split("/")
                if any(part.startswith(".") and part not in (".", "..") for part in parts):
                    ignored["hidden"] += 1
                    continue
                name = prefix + member.name.removeprefix("./")
                count += 1
                if name.lower().endswith(".tar"):
                    inside: Any = archive.extractfile(member)  # it is a file
                    for inner in members_in(inside, name + "/", ignored):
                        yield inner._replace(offset=member.offset_data + inner.offset)
                else:
                    yield Member(name, member.offset_data, member.size)
            # tarfile takes the end of a file, and what is no header, for the end of the archive.
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("the mark of its end is missing")
    except (tarfile.TarError, ValueError, OverflowError) as error:  # of numbers in a header
        raise DamagedTar(f"{what} is damaged after {count} whole files ({error})") from error


def read_part(file: BinaryIO, offset: int, size: int) -> bytes:
    """Bytes of a file, whose position stays; OSError where it ends before."""
    data = b""
    while len(data) < size:  # one call reads 2 GiB at most, and a network's file system less
        more = os.pread(file.fileno(), size - len(data), offset + len(data))
        if not more:
            raise OSError(f"the file ends after {len(data)} of {size} bytes")
        data += more
    return data


class Failed(NamedTuple):
    """What could not be opened. The text alone: an error holds on to all that led to it."""

    reason: str
    until: float


class Opened(Generic[T]):
    """What was used last, by number; each process opens for itself, also after a fork.

    What cannot be opened raises `Unavailable` for a while, and is then tried again.
    """

    def __init__(self, open_one: Callable[[int], T], most: int) -> None:
        self.open_one, self.most = open_one, most
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._open: OrderedDict[int, T | Failed] = OrderedDict()

    def __getstate__(self) -> dict:
        return {"open_one": self.open_one, "most": self.most}

    def __setstate__(self, state: dict) -> None:
        Opened.__init__(self, **state)

    def __getitem__(self, number: int) -> T:
        if self._process != os.getpid():
            self._forget()
        found = self._open.pop(number, None)
        if found is None or (isinstance(found, Failed) and time.monotonic() >= found.until):
            while len(self._open) >= self.most:
                self._open.popitem(last=False)
            found = self._try(number)
        self._open[number] = found
        if isinstance(found, Failed):
            raise Unavailable(found.reason)
        return found

    def _try(self, number: int) -> T | Failed:
        try:
            return patiently(lambda: self.open_one(number))
        except Exception as error:
            if hopeless(error):
                raise
            return Failed(one_line(error), time.monotonic() + AGAIN_AFTER)

    def use(self, number: int, action: Callable[[T], R]) -> R:
        """`action` on it; where the system has an error with it, it is opened anew next time."""
        try:
            return action(self[number])
        except OSError as error:
            if error.errno is not None:  # a stale handle stays stale
                self._open.pop(number, None)
            raise

    def __contains__(self, number: int) -> bool:
        ours = self._process == os.getpid()
        return ours and not isinstance(self._open.get(number, Failed("", 0.0)), Failed)
