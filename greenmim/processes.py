"""The processes of a run: how they join, and what they exchange.

Dead or hung processes are found by others: torchrun and ``srun --kill-on-bad-exit=1`` end the rest,
Gloo and NCCL time out. With one process everything here is a no-op, so a run reads the same for any
number of them.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import re
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from greenmim.guards import PeerError, UserError, first_line
from greenmim.launch import World, set_meeting_point

T = TypeVar("T")
# Seconds to wait before reporting a failed collective: the launcher, which knows who died, reports
# first, and often ends this process meanwhile.
LAUNCHER_SECONDS = 2.0
# Updates between sending a report and reading it.
LAG = 2
_MINUTES_PER_YEAR = 525_600.0  # stands for no limit
_OF_A_COLLECTIVE = re.compile(
    r"gloo|nccl|connection|broken pipe|socket|timed? ?out|process group", re.IGNORECASE
)


class AgreedError(UserError):
    """A UserError that every process raises: the main one shows it, the others are `quiet`."""


class Processes:
    """Joins the processes of a run, and leaves them; a context manager.

    Args:
        world: Rank of this process, and the number of processes.
        device: Device of this process, or a function that gives it on entry and may raise a
            UserError. CUDA tensors go through NCCL, CPU tensors through Gloo.
        hang_minutes: Timeout of a collective; None waits for ever.

    Raises:
        UserError: on entry, if a process does not join or has no usable device.
        PeerError: on exit, in place of the error of a collective that another's death broke.
    """

    joined = False  # whether this process ever joined others

    def __init__(
        self,
        world: World,
        device: torch.device | Callable[[], torch.device],
        hang_minutes: float | None = None,
    ) -> None:
        self.world = world
        self._find_device: Any = device
        if isinstance(device, torch.device):
            self.device, self._find_device = device, lambda: device
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
        if not self.alone:
            problem = self._join(problem)
        if problem:
            agreed = self.common_error(problem)
            _let_main_speak(agreed)
            raise agreed
        return self

    def _join(self, problem: str | None) -> str | None:
        """Join the process group; returns why a process cannot take part, the same in all."""
        on_gpu = problem is None and self.device.type == "cuda"
        rank, size = self.world.rank, self.world.size
        Processes.joined = True
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                store=self._meet(),
                rank=rank,
                world_size=size,
                timeout=self._timeout,
            )
            kind = "cuda" if on_gpu else "cpu"
            problem = _why_not(self.gather((problem, kind, socket.gethostname())))
            if on_gpu and problem is None:
                self.sum_(torch.zeros((), device=self.device))  # NCCL's own errors come here
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"Process {rank} of {size} cannot meet the others: {first_line(error)}; check that"
                " all are started and can reach MASTER_ADDR (GLOO_SOCKET_IFNAME names the network)."
            ) from error
        if problem:
            dist.destroy_process_group()
        return problem

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if self.alone:
            return
        if error is None or isinstance(error, AgreedError):
            try:
                # Nobody leaves before the main process has closed its files: srun would end it.
                self.gather(None)
                dist.destroy_process_group()
                _let_main_speak(error)
                return
            except RuntimeError as lost:
                error = lost
        if isinstance(error, RuntimeError) and _OF_A_COLLECTIVE.search(str(error)):
            time.sleep(LAUNCHER_SECONDS)
            raise PeerError(
                f"Process {self.world.rank} waited in vain for another one, which died or hangs"
                f" ({first_line(error)}); see that process's output, or the launcher's."
            ) from error

    def _meet(self) -> dist.Store:
        """A store that only the processes of this start share.

        torchrun's store outlives the processes that it restarts, and still holds dead addresses. So
        each process registers a random number, which the main one answers with a new prefix.
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
                raise RuntimeError(f"process {min(others)} did not join")
            for other in list(others):
                if store.check([f"call/{other}"]):
                    store.set(f"answer/{store.get(f'call/{other}').decode()}", mine)
                if store.check([f"heard/{mine}/{other}"]):
                    others.discard(other)
            time.sleep(0.02)
        return dist.PrefixStore(mine, store)

    def from_main(self, make: Callable[[], T]) -> T:
        """Call `make` in the main process; its result or UserError reaches all. A collective."""
        if self.alone:
            return make()
        box: list = [None, None]
        if self.world.is_main:
            try:
                box = [make(), None]
            except UserError as error:
                box = [None, str(error)]
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise self.common_error(box[1])
        return box[0]

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """A UserError of one inside becomes one of all. A collective; none may be inside."""
        if self.alone:
            yield
            return
        own = None
        try:
            yield
        except UserError as error:
            own = error
        for rank, text in enumerate(self.gather(None if own is None else str(own))):
            if text is not None:
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

    def collect(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Everybody's tensor by rank, in the main process alone; of one dtype, on the CPU, their
        first sides may differ. A collective."""
        if self.alone:
            return [tensor]
        lengths = self.gather(len(tensor))
        if not self.world.is_main:
            dist.send(tensor.contiguous(), dst=0)
            return []
        found = [tensor, *(tensor.new_empty(n, *tensor.shape[1:]) for n in lengths[1:])]
        for rank, part in enumerate(found[1:], 1):
            dist.recv(part, src=rank)
        return found

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the processes, in place; does not wait for a GPU. A collective."""
        if not self.alone:
            dist.all_reduce(tensor)
        return tensor


def _let_main_speak(error: UserError | None) -> None:
    # The launcher ends all when one exits with an error: the main process prints first.
    if error is not None and error.quiet:
        time.sleep(LAUNCHER_SECONDS)


def _why_not(facts: list[tuple[str | None, str, str]]) -> str | None:
    """Why processes with these (problem, device, host) cannot start together; None if they can."""
    for rank, (problem, _, host) in enumerate(facts):
        if problem:
            return f"Process {rank} on {host}: {problem}" if rank else problem
    kinds = {kind: (rank, host) for rank, (_, kind, host) in enumerate(facts)}
    if len(kinds) == 1:
        return None
    which = [f"{kind} in process {rank} on {host}" for kind, (rank, host) in kinds.items()]
    return (
        f"The processes do not have the same device: {' and '.join(which)}; --device cuda tells why"
        " a GPU is missing, --device cpu uses none."
    )


class Report(NamedTuple):
    """One update as all processes saw it."""

    step: int  # number of the update, from 1
    losses: list[float]  # of every micro-batch of the global batch, in its order
    grad_norm: float  # before clipping
    unreadable: bool  # whether a process met files that it could not read
    stop: bool  # whether a process was asked to stop
    skipped: bool  # whether it was not finite; overflows of a scaler only below 1

    @property
    def loss(self) -> float:
        """Mean loss of the global batch."""
        return math.nan if self.skipped else math.fsum(self.losses) / len(self.losses)

    def bad_micro_batches(self) -> list[int]:
        """Micro-batches whose loss is not finite; all where only the gradient norm is not."""
        bad = [i for i, loss in enumerate(self.losses) if not math.isfinite(loss)]
        return bad or list(range(len(self.losses)))


class Reports:
    """What the processes tell each other after every update, read LAG updates later.

    It is one small vector, summed on the device. Whether it is finite decides there, the same for
    all processes, whether the update is skipped. The host reads it LAG updates later, so nothing
    waits; all read the same at the same update, and so decide the same.

    Args:
        processes: The processes of the run, on whose device the losses are.
        accumulate: Micro-batches of a process in an update.
    """

    def __init__(self, processes: Processes, accumulate: int) -> None:
        self.processes = processes
        self.num_losses = accumulate * processes.world.size
        self._sent: deque[tuple[int, torch.Tensor, torch.cuda.Event | None]] = deque()

    def send(
        self,
        step: int,
        losses: list[torch.Tensor],
        grad_norm: torch.Tensor,
        *,
        scale: torch.Tensor | None = None,
        unreadable: bool = False,
        stop: bool = False,
    ) -> torch.Tensor:
        """Tell the others about an update. A collective that does not wait for a GPU.

        Args:
            step, grad_norm, unreadable, stop: As in `Report`, of this process.
            losses: Scalar losses of this process's micro-batches, in order.
            scale: The gradient scaler's scale, a scalar on the device; None without one. It finds
                its scale by overflows. They count as skipped only below 1, where the scale can no
                longer be the cause.

        Returns:
            Whether to skip the update, a boolean scalar on the device, the same in all processes.
        """
        world, count = self.processes.world, self.num_losses
        vector = torch.zeros(count + 3, device=self.processes.device)
        vector[world.rank : count : world.size] = torch.stack(losses).float()
        vector[count] = grad_norm / world.size
        # `fill_` passes the number to a kernel: no copy from the host.
        vector[count + 1].fill_(float(unreadable))
        vector[count + 2].fill_(float(stop))
        self.processes.sum_(vector)
        norm_counts = True if scale is None else scale < 1
        bad = (vector[count].isfinite().logical_not() & norm_counts) | (
            vector[:count].isfinite().all().logical_not()
        )
        message = torch.cat([vector, bad.float()[None]])
        event = None
        if message.device.type == "cuda":
            message = message.to("cpu", non_blocking=True)  # into page-locked memory
            event = torch.cuda.Event()
            event.record()
        self._sent.append((step, message, event))
        return bad

    def read(self, up_to: int) -> Iterator[Report]:
        """The reports, in order, of the updates up to `up_to` that were not read yet."""
        while self._sent and self._sent[0][0] <= up_to:
            step, message, event = self._sent.popleft()
            if event is not None:
                event.synchronize()
            values, count = message.tolist(), self.num_losses
            flags = (value > 0 for value in values[count + 1 :])
            yield Report(step, values[:count], values[count], *flags)
