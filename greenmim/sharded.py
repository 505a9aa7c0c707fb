"""Tensors in a folder to which every process writes what it holds (`torch.distributed.checkpoint`).

Any other number of processes can read them, without running code that is in it.
"""

from __future__ import annotations

import os
import pathlib
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException

from .guards import one_line

# What the pickle `.metadata` of tensors names. Not BytesStorageMetadata: what it points to, PyTorch
# would unpickle without a look.
_METADATA_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name): getattr(metadata, name)
    for name in (
        *("Metadata", "TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("ChunkStorageMetadata", "MetadataIndex", "StorageMeta"),
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("torch", "Size"): torch.Size,
    # Python 3.13 has another name for it.
    ("pathlib", "PosixPath"): pathlib.PosixPath,
    ("pathlib._local", "PosixPath"): pathlib.PosixPath,
}


def save_sharded(tensors: dict[str, Tensor], folder: pathlib.Path, alone: bool) -> None:
    """Write tensors into a new folder, each process what it holds. A collective, unless `alone`.

    Raises:
        OSError: in every process, when one of them could not write.
    """
    writer = dcp.FileSystemWriter(folder, sync_files=True)
    _with_errors(lambda: dcp.save(tensors, storage_writer=writer, no_dist=alone), folder)


def load_sharded(tensors: dict[str, Tensor], folder: pathlib.Path, alone: bool) -> None:
    """Fill tensors from a folder of `save_sharded`. A collective, unless `alone`.

    Raises:
        OSError: in every process, when one of them could not read.
    """
    reader = _Reader(folder)
    _with_errors(lambda: dcp.load(tensors, storage_reader=reader, no_dist=alone), folder)


def sharded_sizes(folder: pathlib.Path) -> dict[str, int]:
    """The files that a folder of `save_sharded` has to hold, with their sizes in bytes.

    Raises:
        OSError: one of them is not there, or `.metadata`, which names them, cannot be read.
    """
    try:
        entries = _Reader(folder).read_metadata().storage_data.values()
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        raise OSError(f"{folder / '.metadata'} cannot be read: {error}") from error
    names = {".metadata", *(entry.relative_path for entry in entries)}
    sizes = {}
    for name in sorted(names):
        try:
            sizes[name] = os.stat(folder / name).st_size
        except FileNotFoundError as error:
            raise OSError(
                f"{folder / name} is not there: every machine of a run has to see the same folder"
            ) from error
    return sizes


class _Reader(dcp.FileSystemReader):
    """PyTorch's, without running what a pickle says."""

    # Without PyTorch's `rank`, it does not look for other files of metadata.
    def read_metadata(self) -> metadata.Metadata:
        with open(pathlib.Path(self.path) / ".metadata", "rb") as file:
            found = _MetadataUnpickler(file).load()
        for entry in found.storage_data.values():
            if pathlib.Path(entry.relative_path).name != entry.relative_path:
                raise pickle.UnpicklingError(f"it names the file {entry.relative_path} elsewhere")
        if found.storage_meta is None:
            found.storage_meta = metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _METADATA_CLASSES.get((module, name))
        if found is None and module == "torch":
            found = getattr(torch, name, None)
            found = found if isinstance(found, torch.dtype) else None
        if found is None:
            raise pickle.UnpicklingError(f"its .metadata names {module}.{name}, which may run code")
        return found


def _with_errors(work: Callable[[], None], folder: pathlib.Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "no process group": there is one process
            work()
    except CheckpointException as error:  # no Exception: it would pass every handler
        first = next(iter(error.failures.values()), (error,))[0]
        if isinstance(first, OSError) and first.strerror:
            raise OSError(first.errno, first.strerror, str(folder)) from error
        raise OSError(f"{folder}: {one_line(first)}") from error
