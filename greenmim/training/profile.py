"""What a few updates of a run do with their time and memory, for PyTorch's viewers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path

import torch

from greenmim.guards import one_line

# Updates before: compilation, the growth of memory.
WARM_UP, RECORDED = 10, 3
MOST_EVENTS = 100_000  # of memory


class Profile:
    """Records some updates of a run in its folder, and says where; it ends no run.

    Args:
        folder: Gets profile/trace.json.gz and, on a GPU, profile/memory.pickle.
        device: Where the run computes.
        updates: That this call of the run will do; with few, fewer are left out before.
        say: Given a line for the reader.
    """

    def __init__(
        self, folder: Path, device: torch.device, updates: int, say: Callable[[str], None]
    ) -> None:
        self.folder, self.device, self.say = folder / "profile", device, say
        self.done, self.recorded = 0, min(RECORDED, updates)
        self.first = max(0, min(WARM_UP, updates - self.recorded))  # of them, from 0
        self._profiler: torch.profiler.profile | None = None
        self._failed = self._closed = False
        if self.first == 0:
            self._try(self._start)

    def step(self) -> bool:
        """An update is done; whether it was the last one, and `close` is to write."""
        self.done += 1
        if self.done == self.first:
            self._try(self._start)
        return self.done == self.first + self.recorded

    def close(self) -> None:
        """Write what was recorded, once."""
        if self._failed or self._closed:
            return
        self._closed = True
        if self.done <= self.first:
            self._try(self._stop)
            self.say(f"nothing was profiled: the run ended after {self.done} updates")
        elif self._profiler is not None:
            self._try(functools.partial(self._write, self._profiler))

    def _stop(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._forget_memory()

    def _start(self) -> None:
        on_gpu = self.device.type == "cuda"
        kinds = torch.profiler.ProfilerActivity
        self._profiler = torch.profiler.profile(
            activities=[kinds.CPU, *([kinds.CUDA] if on_gpu else [])],
            record_shapes=True,
            profile_memory=True,
        )
        if on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS)
        self._profiler.start()

    def _write(self, profiler: torch.profiler.profile) -> None:
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self.device)
        profiler.stop()
        self.folder.mkdir(exist_ok=True)
        trace = self.folder / "trace.json.gz"
        profiler.export_chrome_trace(str(trace))
        recorded = min(self.done - self.first, self.recorded)
        updates = f"{recorded} update{'s' * (recorded != 1)}"
        told = f"the trace of {updates} is {trace} (https://ui.perfetto.dev shows it)"
        if on_gpu:
            memory = self.folder / "memory.pickle"
            torch.cuda.memory._dump_snapshot(str(memory))
            self._forget_memory()
            told += f", their memory {memory} (https://pytorch.org/memory_viz)"
        self.say(told)

    def _forget_memory(self) -> None:
        """No longer keep a stack trace for every allocation."""
        if self.device.type == "cuda":
            torch.cuda.memory._record_memory_history(enabled=None)

    def _try(self, work: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            work()
        except Exception as error:  # a full disk, a profiler that another program has
            self._failed = True
            with contextlib.suppress(Exception):
                self._forget_memory()
            self.say(f"profiling failed: {one_line(error)}")
