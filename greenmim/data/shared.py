"""Memory that loader processes share with the main one.

PyTorch brings a batch there by itself, but in a thread of its queue, where an error loses the
batch and the main process waits for it for ever. So a batch is made there in the first place.
"""

from __future__ import annotations

import math
import os

import torch
from torch.utils.data import get_worker_info

from greenmim.messages import first_line
from greenmim.recipe import UserError

PLACE = "/dev/shm"
_ADVICE = (
    "raise its limit (docker run --shm-size or --ipc=host), or lower --data.workers or"
    " --data.batch-size"
)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A new tensor, in shared memory where this is a loader process.

    Raises:
        UserError: there is no room.
    """
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    try:
        storage = torch.UntypedStorage._new_shared(size)  # as PyTorch's own collate
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"A loader process gets no {size / 1e6:.1f} MB of shared memory"
            f" ({first_line(error)}); {_ADVICE}."
        ) from error
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy in shared memory where this is a loader process.

    Raises:
        UserError: there is no room.
    """
    if get_worker_info() is None:
        return tensor
    return empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)


def check_room(needed: int) -> None:
    """Raises UserError if so many bytes of shared memory are not free."""
    try:
        found = os.statvfs(PLACE)
    except OSError:  # no such place on this system
        return
    free = found.f_bavail * found.f_frsize
    if found.f_blocks and free < needed:  # a limit of 0 blocks is none
        raise UserError(
            f"{PLACE} has {free / 1e6:.0f} MB of shared memory left and batches on their way from"
            f" the loader processes take {needed / 1e6:.0f} MB; {_ADVICE}."
        )
