"""How a program of ours ends: errors told in a line, exit codes, signals that ask it to stop."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TextIO

EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 3
EXIT_PEER = 4  # another process of the run died, or one hangs
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again with --resume
EXIT_INTERRUPTED = 130  # a shell's code for Ctrl-C


def leave(*_: object) -> None:
    """End at once: for Ctrl-C during imports, where an exception could come up anywhere."""
    os.write(2, b"greenmim: interrupted\n")
    os._exit(EXIT_INTERRUPTED)


def end_of_imports() -> None:
    """From here on Ctrl-C is an exception again, so that what was begun is tidied up."""
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class UserError(Exception):
    """Something the user can put right: shown as one line on stderr, exit code 2.

    `quiet` where another process of the run shows it.
    """

    quiet = False


class PeerError(Exception):
    """Another process of the run died, so that this one ends too: told in one line."""


def first_line(error: BaseException) -> str:
    """What an error says, as part of a sentence of ours: its first line, or its type's name.

    Of libraries that add a trace, or advice for their own users.
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def one_line(error: BaseException) -> str:
    """All of what an error says, without line breaks; its type's name where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Errors that our own checks of the input raise, as one line for the user."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        raise UserError(first_line(error)) from error


# Modules of the extra "train", without which the kernels can be installed.
_TRAIN = (
    "PIL", "filelock", "jsonargparse", "matplotlib", "safetensors", "submitit", "tensorboard",
    "timm", "torchvision", "tqdm", "yaml",
)  # fmt: skip


def missing_package(error: ModuleNotFoundError) -> str | None:
    """A sentence where what was not found is a package of the extra "train", not a part of one."""
    if error.name not in _TRAIN:
        return None
    return f"This needs {error.name}, which is not installed: pip install 'greenmim[train]'."


_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)


def exit_code(work: Callable[[], int], debug: bool = False) -> int:
    """The exit code of a program's work; an error for people is a line on stderr and its code.

    With `debug` such an error comes through, with its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        # Names of files may hold bytes that no encoding has.
        with contextlib.suppress(AttributeError):  # no file of the system's
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        try:
            return work()
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                what = "this name is too long; use a shorter one"
            elif error.errno in _NO_PERMISSION and isinstance(error.filename, str):
                what = f"{error.strerror}; use another path (--debug shows what for)"
            else:
                raise
            raise UserError(f"{error.filename}: {what}.") from error
        except ModuleNotFoundError as error:
            if said := missing_package(error):
                raise UserError(said) from error
            raise
    except (UserError, PeerError) as error:
        if debug:
            raise
        code = EXIT_PEER if isinstance(error, PeerError) else EXIT_BAD_INPUT
        if not getattr(error, "quiet", False):
            try:
                print(f"greenmim: error: {one_line(error)}", file=sys.stderr, flush=True)
            except OSError:  # nobody reads it: the code still tells
                silence(sys.stderr)
        return code


def silence(stream: TextIO) -> None:
    """Lead a stream nowhere, where nobody reads it any more or its disk is full.

    What waits to be written there would fail again at the program's end.
    """
    with contextlib.suppress(OSError, ValueError):  # no file of the system's
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


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
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in self.HANDLED:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # started with nohup
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        self.received = self.received or signal.Signals(number)


def exit_code_of(received: signal.Signals) -> int:
    """Exit code of a run that a signal stopped."""
    return EXIT_INTERRUPTED if received == signal.SIGINT else EXIT_STOPPED
