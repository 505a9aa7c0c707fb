"""Who uses a run's folder: one command at a time.

A file in the folder names the process that holds it, and a thread of that process touches the file
as long as it lives. A file outlasts its process (kill -9, a power cut), so others judge: on the
same machine by whether the process is there, from elsewhere by whether the file is still touched.
No lock of the operating system is needed, which network file systems may not have.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from greenmim.recipe import UserError

NAME = "in_use.json"
BEAT_SECONDS = 5.0


@dataclass(frozen=True)
class Holder:
    """Who holds a folder.

    Attributes:
        token: Of this holding alone.
        place: Where process numbers mean the same: machine, its start, and container.
        born: Tells a process from a later one with its number.
        job, restarts: Slurm's number of the job, and how often it went back into the queue.
    """

    token: str = ""
    host: str = "another machine"
    place: str = ""
    pid: int = 0
    born: str = ""
    job: str = ""
    restarts: int = 0

    def __str__(self) -> str:
        job = f" (Slurm job {self.job})" if self.job else ""
        return f"process {self.pid} on {self.host}{job}" if self.pid else "an unknown process"

    def is_gone(self) -> bool:
        """Whether it is known to have ended: False where that cannot be seen from here."""
        if self.place != _place():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        state, born = _state_and_birth(self.pid)
        return state in ("Z", "X") or born != self.born  # killed, but not yet waited for


class Lease:
    """This process's claim to a folder.

    Args:
        folder: The folder; made when it is not there.
    """

    # From other machines, a holder is taken for dead when its file was not touched for so long:
    # enough for a network file system that hangs.
    stale_seconds = 90.0
    # Between two that take over the same folder at once: the later one wins, and both look.
    settle_seconds = 0.2
    # How long a network file system may hide a new file from another machine.
    hidden_seconds = 60.0

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / NAME
        self.token: str | None = None
        self._released = threading.Event()

    def check_free(self) -> None:
        """Find out, without writing, whether a process of this machine holds the folder.

        Raises:
            UserError: one does.
        """
        try:
            found = self._look()
        except OSError:
            return  # `acquire` says why
        if found and found[0].place == _place() and not found[0].is_gone():
            raise self._in_use(found[0])

    def acquire(self) -> str:
        """Hold the folder from here on; the token that the file shows.

        Raises:
            UserError: another process holds it, or the folder cannot be written.
        """
        token = secrets.token_hex(8)
        beside = self.file.with_name(f".{NAME}.{token}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(dataclasses.asdict(_here(token))))
            try:
                self._take(token, beside)
            finally:
                beside.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"--work-dir {self.folder} cannot be written: {error.strerror}."
            ) from error
        self.token = token
        threading.Thread(target=self._beat, name="lease", daemon=True).start()
        return token

    def must_be_seen(self, token: str) -> None:
        """In every process of a run: the folder is the one that the main process holds.

        Raises:
            UserError: it is another one.
        """
        end = time.monotonic() + self.hidden_seconds
        while not self._shows(token):
            if time.monotonic() > end:
                raise UserError(
                    f"--work-dir {self.folder} on {socket.gethostname()} is not the folder that the"
                    " main process writes to; it has to be on a file system that all machines of"
                    " the run share."
                )
            time.sleep(0.2)

    def check(self) -> None:
        """Find out whether the folder is still held: a suspended process may have lost it.

        Raises:
            UserError: another process took it over.
        """
        try:
            found = self._look()
        except OSError:
            return  # no word on anybody else; what is written next says what is wrong
        if found and found[0].token != self.token:
            raise UserError(
                f"--work-dir {self.folder} was taken over by {found[0]} while this process was not"
                " heard of (was it suspended?); it ends without writing, the checkpoints are whole."
            )

    def release(self) -> None:
        """Let others have the folder; without effect where it is not held."""
        if self.token is None:
            return
        self._released.set()
        try:
            if self._shows(self.token):
                self.file.unlink()
        except OSError:
            pass  # the process ends, which others see
        self.token = None

    def _take(self, token: str, beside: Path) -> None:
        first, since = None, time.monotonic()
        while not self._create(beside):
            found = self._look()
            if found is None:
                continue
            holder, touched = found
            os.utime(beside)
            silent = os.stat(beside).st_mtime - touched  # both by the file system's clock
            left = self.stale_seconds - max(silent, time.monotonic() - since)
            if holder.is_gone() or _is_requeued(holder) or (first in (None, found) and left <= 0):
                os.replace(beside, self.file)
                time.sleep(self.settle_seconds)
                if self._shows(token):
                    return
                continue
            if holder.place == _place() or first not in (None, found):
                raise self._in_use(holder)
            if first is None:
                print(
                    f"--work-dir {self.folder} is held by {holder}, last heard of {silent:.0f} s"
                    f" ago: waiting up to {left:.0f} s for a sign of life.",
                    flush=True,
                )
            first = found
            time.sleep(min(1.0, self.stale_seconds / 10))

    def _create(self, beside: Path) -> bool:
        """The file with our content, unless it is there."""
        text = beside.read_text()
        try:
            file = self.file.open("x")
        except FileExistsError:
            return False
        try:
            with file:
                file.write(text)
        except OSError:
            self.file.unlink(missing_ok=True)
            raise
        return True

    def _look(self) -> tuple[Holder, float] | None:
        """Who holds the folder, and when the file was touched; None where nobody does."""
        try:
            with self.file.open() as file:  # opened: a network file system looks anew
                touched, text = os.fstat(file.fileno()).st_mtime, file.read()
        except FileNotFoundError:
            return None
        try:
            return Holder(**json.loads(text)), touched
        except (ValueError, TypeError):  # being written, or of another version
            return Holder(), touched

    def _shows(self, token: str) -> bool:
        try:
            found = self._look()
        except OSError:
            return False
        return found is not None and found[0].token == token

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            try:
                if self._shows(self.token):
                    os.utime(self.file)
            except OSError:
                pass  # the next one may go through

    def _in_use(self, holder: Holder) -> UserError:
        return UserError(
            f"--work-dir {self.folder} is in use by {holder}; two commands must not share a folder:"
            " wait for that one, end it, or choose another folder."
        )


def _here(token: str) -> Holder:
    job, restarts = os.environ.get("SLURM_JOB_ID", ""), _restarts()
    _, born = _state_and_birth(os.getpid())
    return Holder(token, socket.gethostname(), _place(), os.getpid(), born, job, restarts)


def _is_requeued(holder: Holder) -> bool:
    """Whether this is the same Slurm job, started again: what it was before has ended."""
    return bool(holder.job) and (
        holder.job == os.environ.get("SLURM_JOB_ID") and holder.restarts < _restarts()
    )


def _restarts() -> int:
    text = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(text) if text.isdigit() else 0


def _place() -> str:
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    except OSError:
        pass  # no Linux: the name has to do
    return " ".join(parts)


def _state_and_birth(pid: int) -> tuple[str, str]:
    """A process's state, a letter, and when it began, in ticks; empty where nobody says."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "", ""
    fields = text.rpartition(")")[2].split()  # the name before may hold anything
    return fields[0], fields[19]
