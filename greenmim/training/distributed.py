"""The processes of a run: how they meet, what they tell each other, how one's error becomes all's.

With one process everything here does nothing, so a run reads the same for any number of them.
"""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from greenmim.guards import PeerError
from greenmim.messages import first_line, one_line
from greenmim.recipe import UserError
from greenmim.training.meeting import meet
from greenmim.training.peers import PeerWatch
from greenmim.training.world import World, run_name

T = TypeVar("T")
# How long a collective waits. The watch finds deaths and hangs long before; and a job may be
# suspended for hours, which this limit counts and the watch does not.
COLLECTIVE_HOURS = 24
_OF_A_COLLECTIVE = re.compile(
    r"gloo|nccl|connection|broken pipe|socket|timed? ?out|process group", re.IGNORECASE
)


class AgreedError(UserError):
    """A UserError that every process raises: the main process shows it, the others end quietly."""


class Processes:
    """The processes of a run as one of them sees them; a context manager.

    Args:
        world: Which of them this is.
        device: Where this process computes, or what finds it on entry and raises a UserError where
            it cannot. CUDA tensors go through NCCL, CPU tensors through Gloo.
        hang_minutes: As for `PeerWatch`.

    Attributes:
        device: Where this process computes.

    Raises:
        UserError: on entry, when the others do not come, or one of them has no device.
        PeerError: on leaving, in place of the error of a collective that another's death broke.
    """

    def __init__(
        self,
        world: World,
        device: torch.device | Callable[[], torch.device],
        hang_minutes: float | None = None,
    ) -> None:
        self.world, self.hang_minutes = world, hang_minutes
        if isinstance(device, torch.device):
            self.device = device
            self._find_device = lambda: device
        else:
            self._find_device = device
        self.watch: PeerWatch | None = None

    @property
    def alone(self) -> bool:
        """True in a run of one process."""
        return self.world.size == 1

    def __enter__(self) -> Processes:
        if self.alone:
            self.device = self._find_device()
            return self
        rank, size = self.world.rank, self.world.size
        try:
            store, self.device, wrong = meet(self.world, self._find_device)
            if wrong is not None:
                raise self.common_error(wrong)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
                store=dist.PrefixStore(f"{run_name()}/group", store),
                rank=rank,
                world_size=size,
                timeout=datetime.timedelta(hours=COLLECTIVE_HOURS),
                device_id=self.device if self.device.type == "cuda" else None,
            )
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"Process {rank} of {size} cannot meet the others: {first_line(error)}"
            ) from error
        watched = dist.PrefixStore(f"{run_name()}/watch", store.clone())
        self.watch = PeerWatch(watched, rank, size, self.hang_minutes)
        self.watch.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if self.watch is None:
            return
        if error is None:
            dist.barrier()  # the main process serves the store: it goes last
        if error is None or isinstance(error, AgreedError):
            self.watch.leave()
            dist.destroy_process_group()
        elif isinstance(error, RuntimeError) and _OF_A_COLLECTIVE.search(str(error)):
            # Most likely the trace of another's death, which the watch knows or soon finds out.
            cause = self.watch.wait_for_cause()
            self.watch.report(first_line(error))
            if cause:
                raise PeerError(f"{cause}; process {self.world.rank} ends too.") from error
        else:
            self.watch.report(one_line(error))

    def at(self, step: int, phase: str) -> None:
        """Tell the watch that this process comes to a phase of an update (see `peers.PHASES`).

        All processes come to the same phases in the same order.
        """
        if self.watch is not None:
            self.watch.at(step, phase)

    def finishing(self) -> contextlib.AbstractContextManager[None]:
        """Inside, this process does what needs no other one and is worth finishing if one dies."""
        return contextlib.nullcontext() if self.watch is None else self.watch.finishing()

    def from_main(self, make: Callable[[], T]) -> T:
        """`make()` in the main process alone; what it gives, or its UserError, in all.

        A collective: every process calls it.
        """
        if self.alone:
            return make()
        box: list = [None, None]
        if self.world.is_main:
            try:
                box[0] = make()
            except UserError as error:
                box[1] = str(error)
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise self.common_error(box[1])
        return box[0]

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """A UserError of one process inside becomes one of all, after the others are through too.

        A collective; there is none inside.
        """
        if self.alone:
            yield
            return
        own = None
        try:
            yield
        except UserError as error:
            own = error
        told = self.gather(None if own is None else str(own))
        failed = [(rank, text) for rank, text in enumerate(told) if text is not None]
        if failed:
            rank, text = failed[0]
            raise self.common_error(f"Process {rank}: {text}" if rank else text) from own

    def common_error(self, text: str) -> UserError:
        """The error to raise where all processes know that all raise it."""
        if self.alone:
            return UserError(text)
        error = AgreedError(text)
        error.quiet = not self.world.is_main
        return error

    def gather(self, value: T) -> list[T]:
        """Everybody's value, by rank. A collective."""
        if self.alone:
            return [value]
        values: list = [None] * self.world.size
        dist.all_gather_object(values, value)
        return values

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the processes, in place; does not wait for a GPU. A collective."""
        if not self.alone:
            dist.all_reduce(tensor)
        return tensor
