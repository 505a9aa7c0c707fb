"""Where images come from: a folder, tar files, WebDataset shards, a Hugging Face dataset.

`--data.root` names them as timm's `create_dataset` does, by a prefix; without one it is a folder,
or a tar file. All are looked up by index: so order, crops, masks and resume are as exact for shards
as for a folder. timm's readers are not used: the one for tars keeps Python objects for every image
in every loader process, the one for shards shuffles by the number of processes and workers, and
those of datasets want labels.
"""

from __future__ import annotations

import glob
import io
import os
import tarfile
from typing import Protocol

import numpy as np

from greenmim.data.images import Names, find_images
from greenmim.data.shards import find_shards
from greenmim.data.tars import Opened, images_in, read_part
from greenmim.messages import one_line
from greenmim.recipe import DataConfig, UserError

# Of timm's prefixes, those that are something else than a place in the file system.
_NOT_SUPPORTED = ("hfids", "tfds", "torch")
_MOST_OPEN_TARS = 64


class Source(Protocol):
    """Images by index, from 0.

    Attributes:
        root: What it was asked for by.
        shards: int64 [number of shards], images of each, where neighbours are to be read together;
            None where any order is as good.
    """

    root: str
    shards: np.ndarray | None

    def __len__(self) -> int: ...

    def expect(self, places: int) -> None:
        """Told before reading: in so many places at a time a process will go through shards."""

    def at(self, position: int, turn: int) -> int:
        """Index of the image at a position below the length, in the pass number `turn`, from 0."""

    def path(self, index: int) -> str:
        """The image's name for people."""

    def open(self, index: int) -> str | io.BytesIO:
        """A file's path, or its bytes; raises anything if it cannot be read."""

    def stand_in(self, index: int, step: int) -> int:
        """The index to try as number `step` in the place of one that cannot be read."""

    def some(self, count: int) -> list[int]:
        """Indices of a few images to look at."""

    def notes(self) -> list[str]:
        """What people should know before a run, once its first image was read."""


def find_source(config: DataConfig) -> Source:
    """What `--data.root` names.

    Raises:
        UserError: there is no such thing, or no image in it, or a package is missing.
        OSError: the same of a folder.
    """
    root = config.root
    prefix, slash, rest = root.partition("/")
    prefix = prefix.lower() if slash and not os.path.isdir(root) else ""
    if config.num_samples is not None and prefix != "wds":
        raise UserError("--data.num-samples goes with shards (--data.root wds/...) alone.")
    if prefix == "wds":
        return find_shards(root, rest, config.num_samples)
    if prefix == "hfds":
        return HuggingFace(root, rest)
    if prefix in _NOT_SUPPORTED:
        raise UserError(
            f"--data.root {root}: there is no reader for {prefix}/; take a folder, tar/, wds/ or"
            " hfds/."
        )
    if prefix == "tar":
        return Tars(root, rest)
    if root.lower().endswith(".tar") and not os.path.isdir(root):
        return Tars(root, root)
    return Folder(root)


class _AnyOrder:
    """What sources share whose images can be read in any order."""

    shards: np.ndarray | None = None

    def expect(self, places: int) -> None:
        pass

    def at(self, position: int, turn: int) -> int:
        return position

    def notes(self) -> list[str]:
        return []

    def stand_in(self, index: int, step: int) -> int:
        """The next one."""
        return (index + step) % len(self)

    def some(self, count: int) -> list[int]:
        """Evenly spaced ones."""
        count = min(count, len(self))
        return [index * len(self) // count for index in range(count)]


class Folder(_AnyOrder):
    """Every image file under a folder (see `images.find_images`)."""

    def __init__(self, root: str) -> None:
        self.root, self.names = root, find_images(root)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])

    open = path


class Tars(_AnyOrder):
    """The images in a tar file, or in the tar files of a folder; in tars in tars, too.

    Arrays instead of a list of members, so that loader processes share their memory.

    Args:
        root: What was asked for.
        place: Path of the file or folder.

    Raises:
        UserError: no tar, or no image in it.
    """

    def __init__(self, root: str, place: str) -> None:
        self.root = root
        if not os.path.exists(place):
            raise UserError(f"--data.root {root}: there is no tar file or folder {place}.")
        self.files = (
            [place] if os.path.isfile(place) else sorted(glob.glob(f"{glob.escape(place)}/*.tar"))
        )
        found = []
        for number, path in enumerate(self.files):
            try:
                with open(path, "rb") as file:
                    found += [
                        (os.fsencode(m.name), number, m.offset, m.size) for m in images_in(file)
                    ]
            except tarfile.TarError as error:
                raise UserError(
                    f"--data.root {root}: {path} is no tar file, a compressed or a damaged one"
                    f" ({error}); make it anew, without compression."
                ) from error
        if not found:
            what = "image" if self.files else "tar file (*.tar)"
            raise UserError(f"--data.root {root}: there is no {what} in it.")
        names, files, offsets, sizes = zip(*found, strict=True)
        self.names = Names(names)
        self.file_of = np.array(files, dtype=np.int32)
        self.places = np.array([offsets, sizes], dtype=np.int64).T
        self._opened = Opened(self._open_tar, _MOST_OPEN_TARS)

    def _open_tar(self, number: int) -> io.BufferedReader:
        return open(self.files[number], "rb")

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        return os.path.join(self.files[self.file_of[index]], self.names[index])

    def open(self, index: int) -> io.BytesIO:
        offset, size = self.places[index].tolist()
        file = int(self.file_of[index])
        return io.BytesIO(self._opened.use(file, lambda opened: read_part(opened, offset, size)))


class HuggingFace(_AnyOrder):
    """The training split of a dataset of the Hugging Face hub, or of a folder in their form.

    Args:
        root: What was asked for.
        name: The dataset.

    Raises:
        UserError: no such dataset, no images in it, or no package to read it with.
    """

    def __init__(self, root: str, name: str) -> None:
        self.root, self.name = root, name
        try:
            self._data = self._load()
        except ImportError as error:
            raise UserError(
                f"--data.root {root} needs the package datasets: pip install datasets."
            ) from error
        except Exception as error:  # its own, the network's, the file system's
            raise UserError(f"--data.root {root} cannot be loaded: {one_line(error)}") from error
        self._length = len(self._data)

    def _load(self):
        """The first column of images, alone and not decoded."""
        import datasets

        data = datasets.load_dataset(self.name, split="train")
        images = [k for k, feature in data.features.items() if isinstance(feature, datasets.Image)]
        if not images:
            raise ValueError(f"none of its columns ({', '.join(data.features)}) holds images.")
        data = data.select_columns(images[0])
        return data.cast_column(images[0], datasets.Image(decode=False))

    def __getstate__(self) -> dict:
        # Another process, perhaps on another machine, loads it from its own cache; a fork shares
        # the memory map.
        return self.__dict__ | {"_data": None}

    def __len__(self) -> int:
        return self._length

    def path(self, index: int) -> str:
        return f"{self.root}/{index}"

    def open(self, index: int) -> str | io.BytesIO:
        if self._data is None:
            self._data = self._load()
        (image,) = self._data[int(index)].values()
        return image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])
