"""The folder of a run: what is in it, how checkpoints are written, found and removed.

A checkpoint is `step_N.pth` (weights and all that is small) and the folder `step_N.optimizer` (the
moments, see `training_state`). The folder is written first and the file is renamed into place last:
a checkpoint is whole where its file is, whatever killed the run.

N counts the updates ever done. It grows whatever happens to the schedule's own count, which starts
anew at the same place of the schedule when a run goes on with another number of updates per epoch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from greenmim.checkpoint import load_checkpoint, save_atomic, save_text, sync_folder
from greenmim.messages import first_line
from greenmim.recipe import CheckpointConfig, Recipe, UserError
from greenmim.training.distributed import Processes
from greenmim.training.training_state import moments_sizes

# How long a command that was killed may need to be gone.
SECONDS_TO_DIE = 2.0
# How long a network file system may hide a new file from another machine.
HIDDEN_SECONDS = 60.0
RUN_FORMAT = "greenmim.pretrain"
RUN_VERSION = 2
_STEP_FILE = re.compile(r"step_(\d+)\.pth")
_MOMENTS_FOLDER = re.compile(r"step_\d+\.optimizer")
_LEFT_OVER = re.compile(r"\.(step_\d+\.pth|last)\.\d+")


class RunFolder:
    """config.yaml, log.jsonl, tensorboard/ and checkpoints/ of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.log = self.path / "log.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.last = self.checkpoints / "last.pth"
        self.holder = self.path / "in_use.json"  # who holds the lock, for people and other machines
        self._lock = FileLock(self.path / ".lock")
        self._mine: dict[str, Any] | None = None  # what the holder's file shows while it is held
        self.notes: list[str] = []  # on what went wrong without harm, for the user
        self._told: set[str] = set()
        self._epochs: dict[Path, float] = {}
        self._found: set[int] | None = None

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
        """Find out, without writing, whether another command of this machine holds the folder.

        Raises:
            UserError: one does.
        """
        if self.holder.exists() and not self._requeued():
            with contextlib.suppress(OSError):  # `held` says why
                self._take(SECONDS_TO_DIE)
                self._lock.release()

    def _acquire(self) -> dict[str, Any]:
        """Hold the folder from here on; what its holder's file shows."""
        shown = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "restarts": os.environ.get("SLURM_RESTART_COUNT", "0"),
            "token": secrets.token_hex(8),
        }
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self._requeued():
                # What the job was before has ended, though a file server may not know of it yet.
                Path(self._lock.lock_file).unlink(missing_ok=True)
            self._take(SECONDS_TO_DIE)
            save_text(json.dumps(shown), self.holder)
            self._mine = shown
        except OSError as error:
            raise UserError(
                f"--work-dir {self.path} cannot be written: {_reason(error)}."
            ) from error
        return shown

    def _is_ours(self) -> bool:
        return self._mine is None or self._shown() in (self._mine, {})

    def _check_ours(self) -> None:
        """Find out whether the folder is still ours: its file server may have given it away."""
        if not self._is_ours():
            who = self._shown()
            raise UserError(
                f"--work-dir {self.path} was taken over by process {who['process']} on"
                f" {who['host']}; this one ends without writing, the checkpoints are whole."
            )

    def _take(self, seconds: float) -> None:
        try:
            self._lock.acquire(timeout=seconds)
        except Timeout as error:
            who = self._shown()
            name = f"process {who['process']} on {who['host']}" if who else "another process"
            job = f" (Slurm job {who['job']})" if who.get("job") else ""
            raise UserError(
                f"--work-dir {self.path} is in use by {name}{job}; two commands must not share a"
                " folder: wait for that one, end it, or choose another folder (of one that is known"
                f" to be gone, remove {self._lock.lock_file})."
            ) from error

    def _requeued(self) -> bool:
        """Whether the holder is this Slurm job before it went back into the queue."""
        who, restarts = self._shown(), os.environ.get("SLURM_RESTART_COUNT", "0")
        return bool(who.get("job")) and (
            who["job"] == os.environ.get("SLURM_JOB_ID") and who["restarts"] != restarts
        )

    def _shown(self) -> dict[str, Any]:
        try:
            return json.loads(self.holder.read_text())
        except (OSError, ValueError):
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

    def note_found(self) -> None:
        """Remember what is here: `start` refuses when it has changed."""
        self._found = set(self.by_step())

    def owns(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is one of this run, set aside or not."""
        return self.checkpoints.resolve() in checkpoint.resolve().parents

    def newest_checkpoint(self) -> Path | None:
        """The checkpoint with the most steps."""
        files = self.by_step()
        return files[max(files)] if files else None

    def by_step(self) -> dict[int, Path]:
        """The checkpoints by the number of updates done."""
        if not self.checkpoints.is_dir():
            return {}
        found = ((_STEP_FILE.fullmatch(file.name), file) for file in self.checkpoints.iterdir())
        return {int(match[1]): file for match, file in found if match}

    def num_removable(self, keep: CheckpointConfig) -> int:
        """How many checkpoints newer ones will replace."""
        files = self.by_step().values()
        return sum(not self._is_milestone(file, keep.keep_every_epochs) for file in files)

    def check_usable(self) -> None:
        """Find out without writing anything whether the folder can be made and written to.

        Raises:
            UserError: it cannot.
        """
        place = self._nearest()
        if not place.is_dir():
            raise UserError(f"--work-dir {self.path} cannot be made: {place} is a file.")
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError(f"--work-dir {self.path} cannot be written: no permission in {place}.")

    def free_bytes(self) -> int | None:
        """Bytes left on the disk that the folder is on; None where it does not say."""
        usage = shutil.disk_usage(self._nearest())
        return usage.free if usage.total else None

    def start(self, recipe: Recipe, kept: int) -> None:
        """Make the folder and save the resolved recipe.

        Checkpoints beyond update `kept`, of a course that the run leaves, are set aside.

        Raises:
            UserError: the system refuses, or another command was here since `note_found`.
        """
        text = "# Resolved recipe of this run; pass it back with --config.\n" + yaml.safe_dump(
            recipe.to_dict(), sort_keys=False
        )
        if self._found is not None and set(self.by_step()) != self._found:
            raise UserError(
                f"Another command wrote checkpoints in --work-dir {self.path} while this one"
                " started; repeat it."
            )
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            save_text(text, self.config)
            self._set_aside(kept)
        except OSError as error:
            raise UserError(
                f"--work-dir {self.path} cannot be written: {error.strerror}."
            ) from error

    def save(
        self,
        state: dict[str, Any],
        keep: CheckpointConfig | None,
        write_moments: Callable[[Path], None],
        processes: Processes,
    ) -> tuple[Path, str | None]:
        """Write a checkpoint of `state["updates"]`, point last.pth to it, remove the oldest ones.

        A collective: every process calls it.

        Args:
            state: Content of the file; used in the main process only.
            keep: What is kept; None removes nothing.
            write_moments: Writes the optimiser's state into a new folder; a collective.
            processes: The processes of the run.

        Returns:
            The checkpoint, and in all processes alike why it could not be written (disk full,
            folder gone), if so; older ones are untouched then.

        Raises:
        """
        path = self.checkpoints / f"step_{state['updates']:08d}.pth"
        moments = moments_folder(path)
        problem = processes.from_main(self._remove_left_overs)
        if problem is None:
            try:
                write_moments(moments)
            except OSError as error:
                problem = _reason(error)
        if problem is None:
            problem = processes.from_main(lambda: self._commit(state, path))
        if problem is None and keep is not None:
            processes.from_main(lambda: self._remove_old(keep))
        elif problem is not None:
            processes.from_main(lambda: self._undo(path))
        return path, problem

    def take_notes(self) -> list[str]:
        """What went wrong without harm since the last call."""
        notes, self.notes = self.notes, []
        return notes

    def _commit(self, state: dict[str, Any], path: Path) -> str | None:
        moments = moments_folder(path)
        try:
            sync_folder(moments)
            # Fails where another machine wrote its part elsewhere.
            whole = {**state, "moments": moments_sizes(moments)}
            self._check_ours()  # the moments may have taken long
            save_atomic(whole, path)
        except OSError as error:
            return _reason(error)
        self._point_to(path)
        return None

    def _undo(self, path: Path) -> None:
        if not path.exists():
            shutil.rmtree(moments_folder(path), ignore_errors=True)

    def _nearest(self) -> Path:
        place = self.path.absolute()
        while not place.exists():
            place = place.parent
        return place

    def _point_to(self, path: Path) -> None:
        """last.pth is for people: nothing here needs it, and some file systems have no links."""
        link = self.checkpoints / f".last.{os.getpid()}"
        try:
            link.unlink(missing_ok=True)
            link.symlink_to(path.name)
            os.replace(link, self.last)
        except OSError as error:
            self._tell("last", f"{self.last} could not be made to point to {path}: {error}")

    def _tell(self, topic: str, note: str) -> None:
        if topic not in self._told:
            self._told.add(topic)
            self.notes.append(note)

    def _set_aside(self, kept: int) -> None:
        later = [file for step, file in self.by_step().items() if step > kept]
        if not later:
            return
        number = 1
        while (aside := self.checkpoints / f"set_aside_{number}").exists():
            number += 1
        aside.mkdir()
        for file in later:
            os.replace(file, aside / file.name)
            if moments_folder(file).exists():
                os.replace(moments_folder(file), aside / moments_folder(file).name)
        newest = self.newest_checkpoint()
        if newest is not None:
            self._point_to(newest)
        else:
            self.last.unlink(missing_ok=True)

    def _remove_old(self, keep: CheckpointConfig) -> None:
        self._check_ours()
        try:
            files = self.by_step()
            for step in sorted(files)[: -keep.keep_last]:
                if not self._is_milestone(files[step], keep.keep_every_epochs):
                    files[step].unlink()  # before its moments: see the module's head
                    shutil.rmtree(moments_folder(files[step]), ignore_errors=True)
        except OSError as error:
            self._tell("old", f"an old checkpoint could not be removed: {error}")

    def _is_milestone(self, path: Path, every_epochs: int | None) -> bool:
        if every_epochs is None:
            return False
        if path not in self._epochs:
            try:
                state = load_checkpoint(path, lazily=True)
                self._epochs[path] = state["step"] / state["steps_per_epoch"]
            except Exception:  # anything, of a damaged file: it stays for the user to look at
                return True
        return self._epochs[path] % every_epochs == 0

    def _remove_left_overs(self) -> str | None:
        """What saves that were killed left: folders without their file, and temporary files."""
        self._check_ours()
        try:
            for entry in self.checkpoints.iterdir():
                if _MOMENTS_FOLDER.fullmatch(entry.name):
                    if not entry.with_suffix(".pth").exists():
                        shutil.rmtree(entry, ignore_errors=True)
                elif _LEFT_OVER.fullmatch(entry.name):
                    entry.unlink(missing_ok=True)
        except OSError as error:
            return _reason(error)
        return None


def moments_folder(checkpoint: Path) -> Path:
    """Where the optimiser's state of a checkpoint is."""
    return checkpoint.with_suffix(".optimizer")


def read_run_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint written by `greenmim pretrain`.

    Raises:
        UserError: no such file, unreadable, or not written by `greenmim pretrain`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}.")
    try:
        state = load_checkpoint(path)
    except Exception as error:  # pickle, zip and torch raise anything on a damaged file
        raise UserError(f"The checkpoint {path} cannot be read: {first_line(error)}") from error
    if not isinstance(state, dict) or state.get("format") != RUN_FORMAT:
        raise UserError(
            f"{path} was not written by `greenmim pretrain`; a run cannot go on from it."
        )
    if state.get("version") != RUN_VERSION:
        raise UserError(
            f"{path} has the format {state.get('version')} of another version of greenmim"
            f" ({state.get('greenmim')}), and this one goes on from format {RUN_VERSION} only;"
            " install that version."
        )
    # As `--resume` follows links, so do the moments beside.
    moments = moments_folder(path.resolve())
    if not (moments / ".metadata").is_file():
        raise UserError(f"{path} lacks the optimiser's state {moments.name} beside it; copy both.")
    for name, size in state.get("moments", {}).items():
        file = moments / name
        if not file.is_file() or file.stat().st_size != size:
            there = f"{file.stat().st_size} bytes" if file.is_file() else "not there"
            raise UserError(
                f"The optimiser's state of {path} is damaged: {moments.name}/{name} is {there},"
                f" it was {size} bytes."
            )
    return state


def _reason(error: OSError) -> str:
    return error.strerror or first_line(error)
