"""One command at a time writes to a run's folder: a lock, and a file that says who holds it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from greenmim.checkpoint import save_text
from greenmim.guards import UserError
from greenmim.processes import Processes

# How long a command that was killed may need to be gone.
SECONDS_TO_DIE = 2.0
# How long a network file system may hide a new file from another machine.
HIDDEN_SECONDS = 60.0


class FolderLock:
    """Keeps other commands out of a run's folder, which need not be there yet."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.holder = folder / "in_use.json"  # who holds the lock, for people and other machines
        self._lock = FileLock(folder / ".lock")
        self._mine: dict[str, Any] | None = None  # what the holder's file shows while it is held

    @contextlib.contextmanager
    def held(self, processes: Processes) -> Iterator[None]:
        """Keep other commands out of the folder. A collective.

        Raises:
            UserError: another command runs in it, or the processes see different folders.
        """
        try:
            shown = processes.from_main(self._acquire)
            with processes.agreed():
                self._must_show(shown)
            yield
        finally:
            if self._lock.is_locked:
                with contextlib.suppress(OSError):
                    if self._is_ours():
                        self.holder.unlink()
                self._lock.release()
                self._mine = None

    def check_free(self) -> None:
        """Raises UserError where another command of this machine holds the folder; no writing."""
        if self.holder.exists() and not self._requeued():
            with contextlib.suppress(OSError):  # `held` says why
                self._take()
                self._lock.release()

    def check_ours(self) -> None:
        """Raises UserError where the folder is no longer ours: a file server gave it away."""
        if not self._is_ours():
            who = self._shown()
            raise UserError(
                f"--work-dir {self.path} was taken over by process {who['process']} on"
                f" {who['host']}; this one ends without writing, the checkpoints are whole."
            )

    def _acquire(self) -> dict[str, Any]:
        """Hold the folder from here on; what its holder's file shows."""
        shown = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "restarts": os.environ.get("SLURM_RESTART_COUNT", "0"),
            "token": secrets.token_hex(8),
        }
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if self._requeued():
                # What the job was before has ended, though a file server may not know of it yet.
                Path(self._lock.lock_file).unlink(missing_ok=True)
            self._take()
            save_text(json.dumps(shown), self.holder)
            self._mine = shown
        return shown

    def _take(self) -> None:
        try:
            self._lock.acquire(timeout=SECONDS_TO_DIE)
        except Timeout as error:
            who = self._shown()
            name = f"process {who['process']} on {who['host']}" if who else "another process"
            job = f" (Slurm job {who['job']})" if who.get("job") else ""
            raise UserError(
                f"--work-dir {self.path} is in use by {name}{job}; two commands must not share a"
                " folder: wait for that one, end it, or choose another folder (of one that is known"
                f" to be gone, remove {self._lock.lock_file})."
            ) from error

    def _is_ours(self) -> bool:
        return self._mine is None or self._shown() in (self._mine, {})

    def _requeued(self) -> bool:
        """Whether the holder is this Slurm job before it went back into the queue."""
        who, restarts = self._shown(), os.environ.get("SLURM_RESTART_COUNT", "0")
        same = who.get("job") and who["job"] == os.environ.get("SLURM_JOB_ID")
        return bool(same) and who["restarts"] != restarts

    def _shown(self) -> dict[str, Any]:
        try:
            return json.loads(self.holder.read_text())
        except (OSError, ValueError, RecursionError):
            return {}

    def _must_show(self, shown: dict[str, Any]) -> None:
        """In every process of a run: the folder is the one that the main process holds."""
        end = time.monotonic() + HIDDEN_SECONDS
        while self._shown() != shown:
            if time.monotonic() > end:
                raise UserError(
                    f"--work-dir {self.path} on {socket.gethostname()} is not the folder that the"
                    " main process writes to; it has to be on a file system that all machines of"
                    " the run share."
                )
            time.sleep(0.1)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """An OSError inside is a UserError that names the folder."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--work-dir {folder} cannot be written: {reason}.") from error
