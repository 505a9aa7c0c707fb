"""What keeps a long run safe: signals that ask it to stop, and updates that are not finite."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import torch

EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 3
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again with --resume
EXIT_INTERRUPTED = 130  # a shell's code for Ctrl-C


class StopSignal:
    """While entered, SIGTERM, SIGUSR1 and the first Ctrl-C only set a flag to read later."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    @property
    def exit_code(self) -> int:
        """Exit code of a run that was stopped."""
        return EXIT_INTERRUPTED if self.received == signal.SIGINT else EXIT_STOPPED


class FiniteGuard:
    """Counts updates whose loss or gradient is not finite, on the device: looking costs no sync.

    Args:
        device: Where the counters live.
        limit: Such updates in a row after which the run has to stop.
    """

    def __init__(self, device: torch.device, limit: int) -> None:
        self.limit = limit
        self._in_a_row = torch.zeros((), device=device)
        self._total = torch.zeros((), device=device)
        self._longest = torch.zeros((), device=device)

    def count(self, bad: torch.Tensor) -> None:
        """Take note of one update; `bad` is a boolean scalar on the device."""
        self._in_a_row = (self._in_a_row + 1) * bad
        self._longest = torch.maximum(self._longest, self._in_a_row)
        self._total = self._total + bad

    def total(self) -> int:
        """Updates skipped so far (waits for the device)."""
        return int(self._total)

    def restore(self, total: int) -> None:
        """Go on counting from a checkpoint's number."""
        self._total.fill_(float(total))

    def tripped(self) -> bool:
        """Whether the limit was reached (waits for the device)."""
        return int(self._longest) >= self.limit
