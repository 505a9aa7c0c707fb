"""The optimiser's moments on disk, written and read by all processes together.

`torch.distributed.checkpoint` lets every process write what it holds, and any other number of
processes read its part of it: a run saved on two goes on on one or four, whatever the strategy.
"""

from __future__ import annotations

import os
import pathlib
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException

from greenmim.messages import one_line

MOMENTS = ("exp_avg", "exp_avg_sq")
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


def write_moments(
    model: nn.Module, optimizer: torch.optim.AdamW, folder: Path, alone: bool
) -> None:
    """Write AdamW's state into a new folder. A collective, unless `alone`.

    Raises:
        OSError: in every process, when one of them could not write.
    """
    _with_errors(lambda: _save(_moments(model, optimizer), folder, alone), folder)


def read_moments(model: nn.Module, optimizer: torch.optim.AdamW, folder: Path, alone: bool) -> None:
    """Read AdamW's state from a folder of `write_moments`. A collective, unless `alone`.

    Raises:
        OSError: in every process, when one of them could not read.
    """
    for parameter in _trained(model).values():
        optimizer.state[parameter] = {
            # As the fused AdamW starts them.
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            **{name: torch.zeros_like(parameter, requires_grad=False) for name in MOMENTS},
        }
    state = _moments(model, optimizer)
    _with_errors(lambda: _load(state, folder, alone), folder)


def moments_sizes(folder: Path) -> dict[str, int]:
    """The files that a folder of `write_moments` has to hold, with their sizes in bytes.

    Raises:
        OSError: one of them is not there, or `.metadata`, which names them, cannot be read.
    """
    try:
        entries = _Reader(folder).read_metadata().storage_data.values()
    except (pickle.UnpicklingError, EOFError, AttributeError) as error:
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
        with open(Path(self.path) / ".metadata", "rb") as file:
            found = _MetadataUnpickler(file).load()
        for entry in found.storage_data.values():
            if Path(entry.relative_path).name != entry.relative_path:
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


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _moments(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in _trained(model).items():
        for key, tensor in optimizer.state[parameter].items():
            found[f"{name}/{key}"] = tensor
    return found


def _save(state: dict[str, torch.Tensor], folder: Path, alone: bool) -> None:
    writer = dcp.FileSystemWriter(folder, sync_files=True)
    dcp.save(state, storage_writer=writer, no_dist=alone)


def _load(state: dict[str, torch.Tensor], folder: Path, alone: bool) -> None:
    dcp.load(state, storage_reader=_Reader(folder), no_dist=alone)


def _with_errors(run: Callable[[], None], folder: Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "no process group": there is one process
            run()
    except CheckpointException as error:  # no Exception: it would pass every handler
        first = next(iter(error.failures.values()), (error,))[0]
        if isinstance(first, OSError) and first.strerror:
            raise OSError(first.errno, first.strerror, str(folder)) from error
        raise OSError(f"{folder}: {one_line(first)}") from error
