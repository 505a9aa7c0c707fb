"""The optimiser's moments on disk, written and read by all processes together.

`torch.distributed.checkpoint` lets every process write what it holds, and any other number of
processes read its part of it: a run saved on two goes on on one or four, whatever the strategy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

MOMENTS = ("exp_avg", "exp_avg_sq")


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
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=alone)


def _with_errors(run: Callable[[], None], folder: Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "no process group": there is one process
            run()
    except CheckpointException as error:  # no Exception: it would pass every handler
        first = next(iter(error.failures.values()), (error,))[0]
        if isinstance(first, OSError) and first.strerror:
            raise OSError(first.errno, first.strerror, str(folder)) from error
        text = " ".join(str(first).split()) or type(first).__name__
        raise OSError(f"{folder}: {text}") from error
