"""What a run ends with, and the signals that ask it to stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType

EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 3
EXIT_PEER = 4  # another process of the run died, or one hangs
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again with --resume
EXIT_INTERRUPTED = 130  # a shell's code for Ctrl-C


class PeerError(Exception):
    """Another process of the run died, so that this one ends too: told in one line."""


class StopSignal:
    """While entered, signals that ask a program to end only set a flag to read later.

    Those are SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 and the first Ctrl-C: Slurm sends SIGTERM, and
    SIGUSR1 or SIGUSR2 (submitit) some time before a job's end.

    Attributes:
        received: The first of them; what follows it only says the same more urgently.
    """

    HANDLED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._interrupted = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in self.HANDLED:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # started with nohup
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        self.received = self.received or signal.Signals(number)


def exit_code_of(received: signal.Signals) -> int:
    """Exit code of a run that a signal stopped."""
    return EXIT_INTERRUPTED if received == signal.SIGINT else EXIT_STOPPED
