"""The processes of a run: how they meet, what they tell each other, how one's error becomes all's.

Who died or hangs is left to those who know best: torchrun and ``srun --kill-on-bad-exit=1`` end the
others, Gloo and NCCL end a wait that is too long. With one process everything here does nothing, so
a run reads the same for any number of them.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from greenmim.guards import PeerError
from greenmim.messages import first_line
from greenmim.recipe import UserError
from greenmim.training.world import World, set_meeting_point

T = TypeVar("T")
# How long a process waits to say that a collective failed: the launcher, which sees who died, has
# the first word, and often ends this process meanwhile.
LAUNCHER_SECONDS = 2.0
_MINUTES_PER_YEAR = 525_600.0  # in the place of no limit
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
        hang_minutes: How long a collective waits for a process; None for ever.

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
        self.world = world
        if isinstance(device, torch.device):
            self.device = device
            self._find_device = lambda: device
        else:
            self._find_device = device
        self._timeout = datetime.timedelta(minutes=hang_minutes or _MINUTES_PER_YEAR)

    @property
    def alone(self) -> bool:
        """True in a run of one process."""
        return self.world.size == 1

    def __enter__(self) -> Processes:
        problem = None
        try:
            self.device = self._find_device()
            torch.zeros((), device=self.device)
        except UserError as error:
            problem = str(error)
        except RuntimeError as error:
            problem = f"The device cannot be used: {first_line(error)}"
        if self.alone:
            if problem:
                raise UserError(problem)
            return self
        on_gpu = problem is None and self.device.type == "cuda"
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                store=self._meet(),
                rank=self.world.rank,
                world_size=self.world.size,
                timeout=self._timeout,
            )
            kind, version = "cuda" if on_gpu else "cpu", str(torch.__version__)
            problem = _why_not(self.gather((problem, kind, version, socket.gethostname())))
            if on_gpu and problem is None:
                self.sum_(torch.zeros((), device=self.device))  # NCCL's own errors come here
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"Process {self.world.rank} of {self.world.size} cannot meet the others:"
                f" {first_line(error)}"
            ) from error
        if problem:
            dist.destroy_process_group()
            error = self.common_error(problem)
            self._let_main_speak(error)
            raise error
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if self.alone:
            return
        if error is None or isinstance(error, AgreedError):
            try:
                # None goes before the main process has closed its files: srun would end it.
                self.gather(None)
                dist.destroy_process_group()
                self._let_main_speak(error)
                return
            except RuntimeError as lost:
                error = lost
        if isinstance(error, RuntimeError) and _OF_A_COLLECTIVE.search(str(error)):
            time.sleep(LAUNCHER_SECONDS)
            raise PeerError(
                f"Process {self.world.rank} waited in vain for another one, which died or hangs"
                f" ({first_line(error)}); its own output or the launcher's says why."
            ) from error

    def _let_main_speak(self, error: BaseException | None) -> None:
        # The first process that ends with a code may have the launcher end the rest.
        if isinstance(error, AgreedError) and error.quiet:
            time.sleep(LAUNCHER_SECONDS)

    def _meet(self) -> dist.Store:
        """A store that these processes share, and nobody before them.

        torchrun's outlives those that it restarts, and would tell where they could be reached. So
        each calls with a number of its own, which the main process answers with the name of a part.
        """
        set_meeting_point()
        rank, size, mine = self.world.rank, self.world.size, secrets.token_hex(8)
        store, *_ = next(dist.rendezvous("env://", rank, size, timeout=self._timeout))
        store.set(f"call/{rank}", mine)
        if rank > 0:
            store.wait([f"answer/{mine}"], self._timeout)
            name = store.get(f"answer/{mine}").decode()
            store.set(f"heard/{name}/{rank}", "")
            return dist.PrefixStore(name, store)
        others, end = set(range(1, size)), time.monotonic() + self._timeout.total_seconds()
        while others:
            if time.monotonic() > end:
                raise RuntimeError(f"process {min(others)} did not come")
            for other in list(others):
                if store.check([f"call/{other}"]):
                    store.set(f"answer/{store.get(f'call/{other}').decode()}", mine)
                if store.check([f"heard/{mine}/{other}"]):
                    others.discard(other)
            time.sleep(0.02)
        return dist.PrefixStore(mine, store)

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


def _why_not(facts: list[tuple[str | None, str, str, str]]) -> str | None:
    """Why processes that say (problem, device, version of torch, host) cannot start together."""
    for rank, (problem, *_, host) in enumerate(facts):
        if problem:
            return f"Process {rank} on {host}: {problem}" if rank else problem
    advice = {
        "device": "--device cuda says why there is no GPU, --device cpu takes none anywhere",
        "torch": "install one version everywhere",
    }
    for place, (name, what) in enumerate(advice.items(), start=1):
        kinds = {fact[place]: (rank, fact[3]) for rank, fact in enumerate(facts)}
        if len(kinds) > 1:
            which = " and ".join(
                f"{kind} in process {rank} on {host}" for kind, (rank, host) in kinds.items()
            )
            return f"The processes do not have the same {name}: {which}; {what}."
    return None
