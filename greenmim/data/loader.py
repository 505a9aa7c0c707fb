"""Batches of augmented images with their masks planned ahead, from loader processes to the device.

They do not depend on the number of those (see `sampler`). A batch is made in shared memory at once:
PyTorch would bring it there in a thread of its queue, where an error loses it for ever.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import multiprocessing
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info

from greenmim.config import UNIT_PIXELS
from greenmim.data.dataset import AugmentedImages, Finish, Sample
from greenmim.data.sampler import MASK, READERS, Item, MicroBatches, generator
from greenmim.guards import StopSignal, UserError, first_line
from greenmim.masking import draw_visible
from greenmim.planning import Plan, Planner
from greenmim.recipe import MaskConfig
from greenmim_kernels.host_memory import return_freed_memory

SHARED_MEMORY = "/dev/shm"
_ADVICE = (
    "raise its limit (docker run --shm-size or --ipc=host), or lower --data.workers or"
    " --data.batch-size"
)
# Seconds of waiting for a batch between two looks whether to stop.
_POLL_SECONDS = 2
_CLOSE_SECONDS = 3.0
_DIED = re.compile(r"DataLoader worker \(pid.*(exited unexpectedly|is killed by signal)")
_NO_MEMORY = (
    "most often memory ran out: lower --data.workers, or raise a container's limits of memory and"
    " /dev/shm"
)
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


@dataclass(frozen=True, eq=False)
class Batch:
    """Images and the plan of their masks; both None where `stop` is set.

    It is text, as an error loses its message between processes.
    """

    # float32 [B, 3, H, W], or uint8 with flips still to be done, channels last in memory
    images: torch.Tensor
    plan: Plan
    failures: tuple[tuple[str, str], ...]  # (path, reason) of files that could not be read
    flips: torch.Tensor | None = None  # bool [B], which images to flip; None where all is done
    stop: str | None = None  # why the run cannot continue
    labels: tuple[str | None, ...] = ()  # classes of the images, where they were asked for

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return self if self.images is None else self._map(lambda part: part.pin_memory())

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        for tensor in (self.images, self.plan.memory, self.flips):
            if tensor is not None:
                tensor.record_stream(stream)

    def _map(self, change: Callable) -> Batch:
        flips = None if self.flips is None else change(self.flips)
        return replace(self, images=change(self.images), plan=change(self.plan), flips=flips)


class Collate:
    """Stacks samples, draws the masks and plans them: the host's work of a step, in the loader.

    `finish` None leaves the last steps of augmentation to the device.
    """

    def __init__(self, planner: Planner, mask: MaskConfig, seed: int, finish: Finish | None):
        self.planner, self.mask, self.seed, self.finish = planner, mask, seed, finish

    def __call__(self, samples: list[Sample]) -> Batch:
        failures = tuple(dict.fromkeys(failure for s in samples for failure in s.failures))
        stop = next((sample.stop for sample in samples if sample.stop), None)
        try:
            if not stop:
                return self._batch(samples, failures)
        except UserError as error:
            stop = str(error)
        # `stop` is checked before anything else is used.
        return Batch(None, None, failures, stop=stop)  # type: ignore[arg-type]

    def _batch(self, samples: list[Sample], failures: tuple[tuple[str, str], ...]) -> Batch:
        plan = self._plan([sample.item for sample in samples])
        height, width = (side * UNIT_PIXELS for side in self.planner.unit_grid)
        labels = tuple(sample.label for sample in samples)
        if self.finish is not None:
            images = empty_shared((len(samples), 3, height, width), torch.float32)
            # One by one: an image stays in the processor's cache, a batch does not.
            for image, sample in zip(images, samples, strict=True):
                self.finish.into(image, sample.image, sample.flip)
            return Batch(images, plan, failures, labels=labels)
        # Crops are channels last, and are left so.
        images = empty_shared((len(samples), height, width, 3), torch.uint8).permute(0, 3, 1, 2)
        for image, sample in zip(images, samples, strict=True):
            image.copy_(sample.image)
        flips = copied_shared(torch.tensor([sample.flip for sample in samples]))
        return Batch(images, plan, failures, flips, labels=labels)

    def visible(self, items: list[Item]) -> np.ndarray:
        """Visible units of a micro-batch: bool [L] for all images, or [B, L], one row each."""
        mask, first = self.mask, items[0]
        rng = generator(self.seed, MASK, first.step, first.micro_batch)
        batch = len(items) if mask.per_image else None
        return draw_visible(rng, self.planner.unit_grid, mask.ratio, batch, mask.kind)

    def _plan(self, items: list[Item]) -> Plan:
        plan = self.planner(self.visible(items))
        return Plan(copied_shared(plan.memory), plan.layout)

    def batch_bytes(self, count: int) -> int:
        """Shared memory of a batch of so many images, in bytes."""
        pixels = count * 3 * math.prod(side * UNIT_PIXELS for side in self.planner.unit_grid)
        images = pixels * (1 if self.finish is None else 4)
        return images + self._plan([Item(0, 0, 0, 0)] * count).memory.nbytes


def empty_shared(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A new tensor, in shared memory where this is a loader process; UserError without room."""
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
    # torch's stubs know no such call.
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)  # type: ignore[call-overload]


def copied_shared(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, in shared memory where this is a loader process; UserError without room."""
    return empty_shared(tuple(tensor.shape), tensor.dtype).copy_(tensor)


def make_loader(
    dataset: AugmentedImages,
    sampler: MicroBatches,
    collate: Collate,
    workers: int,
    pin_memory: bool,
) -> DataLoader:
    """A loader over all that the sampler yields; its workers live until that ends."""
    # Batches come from the order's readers in turn, and go to the workers in turn.
    readers = READERS * sampler.accumulate
    dataset.source.expect(readers // math.gcd(max(workers, 1), readers))
    with warnings.catch_warnings():
        # Of more workers than cores, which do no harm, once for each loader.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=pin_memory,
            worker_init_fn=_start_worker,
            timeout=_POLL_SECONDS if workers else 0,  # no error: see `Feed.next`
            # Its own: a loader draws a seed when it starts, which must not move the run's stream.
            generator=torch.Generator().manual_seed(0),
        )


def check_shared_memory(loader: DataLoader, processes: int) -> None:
    """Raises UserError where the batches of so many processes do not fit in shared memory."""
    if not loader.num_workers:
        return
    # Each worker makes batches ahead, and the main process still holds the one before.
    of: Any = loader  # made by `make_loader`
    batches = processes * (of.num_workers * of.prefetch_factor + 1)
    needed = batches * of.collate_fn.batch_bytes(of.batch_sampler.batch_size)
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:  # no such place on this system
        return
    free = found.f_bavail * found.f_frsize
    if found.f_blocks and free < needed:  # a limit of 0 blocks is none
        raise UserError(
            f"{SHARED_MEMORY} has {free / 1e6:.0f} MB of shared memory left, and the batches of the"
            f" loader processes take {needed / 1e6:.0f} MB; {_ADVICE}."
        )


def _start_worker(worker: int) -> None:
    # A scheduler signals the whole process group; only the main process may decide what happens,
    # and it still needs batches until the update under way is done.
    for number in StopSignal.HANDLED:
        signal.signal(number, signal.SIG_IGN)
    # The main process of a run on a CPU keeps what it frees; a picture is large once.
    return_freed_memory()
    # So it would outlive that process, if that is killed while this one hangs.
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def peak_own_memory(process: int | None) -> int:
    """Peak of a process's resident memory that is no file's, in bytes; 0 where nobody knows.

    A process that was forked starts with that of its parent, which they share.
    """
    with contextlib.suppress(OSError, KeyError):
        with open(f"/proc/{process}/status", encoding="utf-8", errors="replace") as status:
            found = dict(line.split(":", 1) for line in status)
        peak, of_files = (int(found[name].split()[0]) for name in ("VmHWM", "RssFile"))
        return 1024 * (peak - of_files)  # those hardly go once they are there
    return 0


def _without_pytorchs(handler: Any) -> Any:
    """A handler of SIGCHLD that interrupts nothing, and lets the ends of children be seen."""
    is_pytorchs = getattr(handler, "__module__", "").startswith("torch.")
    return signal.SIG_DFL if is_pytorchs or handler == signal.SIG_IGN else handler


class Feed:
    """The batches of a loader, with the time spent waiting for them and the files that failed.

    `finish` is as for `Collate`, on the device. The loader's processes start with `start`, or with
    the first `next`.

    Attributes:
        give_up: Called while a batch does not come; True ends the wait.
        waited: Seconds spent waiting so far.
        failures: (path, reason) of unreadable files, each once, since the last `take_failures`.
    """

    def __init__(
        self, loader: DataLoader, device: torch.device, finish: Finish | None = None
    ) -> None:
        self.loader, self.device, self.finish = loader, device, finish
        self.give_up: Callable[[], bool] = lambda: False
        self.waited = 0.0
        self.failures: list[tuple[str, str]] = []
        self._named: set[str] = set()
        # Copies have a stream of their own, so that they overlap the previous update.
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._batches: Iterator[Batch] | None = None
        # Bytes of each at its start: what it shares with this process.
        self._workers: dict[multiprocessing.process.BaseProcess, int] = {}

    def start(self) -> Iterator[Batch]:
        if self._batches is None:
            others = set(multiprocessing.active_children())
            # PyTorch's handler would raise the death of a worker wherever the main thread is, even
            # inside a save. Without it `_wait` finds the death, at its next timeout.
            main = threading.current_thread() is threading.main_thread()
            before = signal.getsignal(signal.SIGCHLD) if main else None
            self._batches = iter(self.loader)
            if before is not None:
                signal.signal(signal.SIGCHLD, _without_pytorchs(before))
            workers = set(multiprocessing.active_children()) - others
            self._workers = {worker: peak_own_memory(worker.pid) for worker in workers}
        return self._batches

    def memory(self) -> int:
        """Bytes that the loader's processes took at most, beyond those of this process."""
        return sum(
            max(peak_own_memory(worker.pid) - start, 0) for worker, start in self._workers.items()
        )

    def close(self) -> None:
        """End the loader's processes; those that hang within a few seconds."""
        late = threading.Timer(_CLOSE_SECONDS, self._kill)
        late.start()
        self._batches = None  # asks each to end, and waits for it
        late.cancel()
        self._kill()
        for worker in self._workers:
            worker.join(_CLOSE_SECONDS)

    def _kill(self) -> None:
        for worker in self._workers:
            if worker.is_alive():
                worker.kill()

    def next(self) -> Batch | None:
        """The next batch on the device; None where `give_up` said so.

        Raises:
            UserError: no image can be read any more, or a loader process died.
        """
        batches = self.start()
        asked = time.perf_counter()
        batch = self._wait(batches)
        if batch is None:
            return None
        # Once, not in every epoch: to name them takes a wait for the other processes.
        self.failures += [failure for failure in batch.failures if failure[0] not in self._named]
        self._named.update(path for path, _ in batch.failures)
        if batch.stop:
            raise UserError(batch.stop)
        batch = self._to_device(batch)
        self.waited += time.perf_counter() - asked
        if batch.flips is not None and self.finish is not None:
            batch = replace(batch, images=self.finish(batch.images, batch.flips), flips=None)
        return batch

    def _wait(self, batches: Iterator[Batch]) -> Batch | None:
        while True:
            try:
                return next(batches)
            except RuntimeError as error:
                if "DataLoader timed out" in str(error):
                    if self.give_up():
                        return None
                    continue
                # Not what a worker raised, which says "Caught ... in DataLoader worker".
                if not _DIED.match(str(error)):
                    raise
                codes = [worker.exitcode for worker in self._workers if worker.exitcode]
                killed = {-signal.SIGKILL, -signal.SIGBUS}.intersection(codes)
                why = _NO_MEMORY if killed or not codes else "its own output may say why"
                raise UserError(
                    f"A loader process died ({' '.join(str(error).split())}; exit code"
                    f" {', '.join(map(str, codes)) or 'unknown'}); {why}."
                ) from error

    def _to_device(self, batch: Batch) -> Batch:
        if self._copies is None:
            return batch.to(self.device)
        with torch.cuda.stream(self._copies):
            batch = batch.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._copies)
        batch.record_stream(current)
        return batch

    def take_failures(self) -> list[tuple[str, str]]:
        taken, self.failures = self.failures, []
        return taken
