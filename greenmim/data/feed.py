"""The batches of a loader, on the device: waited for, copied beside the update before."""

from __future__ import annotations

import contextlib
import multiprocessing
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch.utils.data import DataLoader

from greenmim.data.augment import Finish
from greenmim.data.loader import Batch
from greenmim.recipe import UserError

_CLOSE_SECONDS = 3.0
_DIED = re.compile(r"DataLoader worker \(pid.*(exited unexpectedly|is killed by signal)")


class Feed:
    """The batches of a loader, with the time spent waiting for them and the files that failed.

    Args:
        loader: The loader.
        device: Where batches go.
        give_up: Asked again and again while a batch does not come: whether to wait no longer.

    Attributes:
        waited: Seconds spent waiting so far.
        failures: (path, reason) of files that could not be read, each once.
    """

    def __init__(
        self,
        loader: DataLoader,
        device: torch.device,
        give_up: Callable[[], bool] = lambda: False,
    ) -> None:
        self.device, self.give_up = device, give_up
        # Copies have a stream of their own: they run beside the update before.
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.waited = 0.0
        self.failures: list[tuple[str, str]] = []
        self._finish = Finish(loader.dataset.config, device)
        others = set(multiprocessing.active_children())
        self._batches = iter(loader)
        self._workers = set(multiprocessing.active_children()) - others
        self._named: set[str] = set()

    def close(self) -> None:
        """End the loader's processes, in a few seconds those that hang, too."""
        late = threading.Timer(_CLOSE_SECONDS, self._kill)
        late.start()
        with _children_may_end():
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
        """The next batch, on the device, as the model takes it; None where waiting was given up.

        Raises:
            UserError: no image can be read any more, or a loader process died.
        """
        asked = time.perf_counter()
        batch = self._wait()
        if batch is None:
            return None
        self._name(batch.failures)
        if batch.stop:
            raise UserError(batch.stop)
        batch = self._to_device(batch)
        self.waited += time.perf_counter() - asked
        if batch.flips is None:
            return batch
        return replace(batch, images=self._finish(batch.images, batch.flips), flips=None)

    def _wait(self) -> Batch | None:
        while True:
            try:
                return next(self._batches)
            except RuntimeError as error:
                if "DataLoader timed out" in str(error):
                    if self.give_up():
                        return None
                    continue
                # Not what a worker raised, which says "Caught ... in DataLoader worker".
                if not _DIED.match(str(error)):
                    raise
                raise UserError(
                    f"A loader process died ({' '.join(str(error).split())}); most often memory"
                    " ran out: lower --data.workers, or raise the limit of /dev/shm in a"
                    " container."
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

    def _name(self, failures: tuple[tuple[str, str], ...]) -> None:
        for path, reason in failures:
            if path not in self._named:
                self._named.add(path)
                self.failures.append((path, reason))

    def take_failures(self) -> list[tuple[str, str]]:
        """The failures since the last call."""
        taken, self.failures = self.failures, []
        return taken


@contextlib.contextmanager
def _children_may_end() -> Iterator[None]:
    """Inside, the end of a loader process is not the error that PyTorch takes it for."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        if before is not None:  # else it was no handler of Python's
            signal.signal(signal.SIGCHLD, before)
