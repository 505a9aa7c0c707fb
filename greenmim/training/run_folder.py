"""The folder of a run: what is in it, how checkpoints are written, found and removed.

A checkpoint is `step_N.pth` (weights and all that is small) and the folder `step_N.optimizer` (the
moments, see `training_state`). The folder is written first and the file is renamed into place last:
a checkpoint is whole where its file is, whatever killed the run.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from greenmim.checkpoint import load_checkpoint, save_atomic, sync_folder
from greenmim.recipe import CheckpointConfig, Recipe, UserError
from greenmim.training.distributed import Processes

RUN_FORMAT = "greenmim.pretrain"
RUN_VERSION = 2
_STEP_FILE = re.compile(r"step_(\d+)\.pth")
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

    def holds_run(self) -> bool:
        """Whether a run was started here."""
        return self.config.exists() or self.log.exists() or bool(self.by_step())

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

    def start(self, recipe: Recipe, first_step: int) -> None:
        """Make the folder and save the resolved recipe.

        Checkpoints beyond `first_step`, of a course that the run leaves, are set aside.

        Raises:
            UserError: the system refuses.
        """
        text = "# Resolved recipe of this run; pass it back with --config.\n" + yaml.safe_dump(
            recipe.to_dict(), sort_keys=False
        )
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            temporary = self.config.with_name(f".{self.config.name}.{os.getpid()}")
            temporary.write_text(text)
            os.replace(temporary, self.config)
            self._set_aside(first_step)
        except OSError as error:
            raise UserError(
                f"--work-dir {self.path} cannot be written: {error.strerror}."
            ) from error

    def save(
        self,
        state: dict[str, Any],
        keep: CheckpointConfig,
        write_moments: Callable[[Path], None],
        processes: Processes,
    ) -> Path:
        """Write a checkpoint of `state["step"]`, point last.pth to it, remove the oldest ones.

        A collective: every process calls it.

        Args:
            state: Content of the file; used in the main process only.
            keep: What is kept.
            write_moments: Writes the optimiser's state into a new folder; a collective.
            processes: The processes of the run.

        Raises:
            UserError: it cannot be written (disk full, folder gone); older ones are untouched.
        """
        path = self.checkpoints / f"step_{state['step']:08d}.pth"
        moments = moments_folder(path)
        processes.from_main(lambda: self._remove_left_overs(path))
        try:
            write_moments(moments)
        except OSError as error:
            processes.from_main(lambda: shutil.rmtree(moments, ignore_errors=True))
            raise processes.common_error(_not_written(path, error)) from error

        def commit() -> None:
            try:
                sync_folder(moments)
                save_atomic(state, path)
                self._point_to(path)
            except OSError as error:
                if not path.exists():
                    shutil.rmtree(moments, ignore_errors=True)
                raise UserError(_not_written(path, error)) from error
            self._remove_old(keep, state["steps_per_epoch"])

        def finish() -> None:
            # What the others had to write is written: the death of one must not end this.
            with processes.finishing():
                commit()

        processes.from_main(finish)
        return path

    def _nearest(self) -> Path:
        place = self.path.absolute()
        while not place.exists():
            place = place.parent
        return place

    def _point_to(self, path: Path) -> None:
        link = self.checkpoints / f".last.{os.getpid()}"
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
        os.replace(link, self.last)

    def _set_aside(self, first_step: int) -> None:
        later = [file for step, file in self.by_step().items() if step > first_step]
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

    def _remove_old(self, keep: CheckpointConfig, steps_per_epoch: int) -> None:
        files = self.by_step()
        period = keep.keep_every_epochs and keep.keep_every_epochs * steps_per_epoch
        for step in sorted(files)[: -keep.keep_last]:
            if not (period and step % period == 0):
                files[step].unlink(missing_ok=True)  # before its moments: see the module's head
                shutil.rmtree(moments_folder(files[step]), ignore_errors=True)

    def _remove_left_overs(self, path: Path) -> None:
        """What saves that were killed left: folders without their file, and temporary files."""
        try:
            for entry in self.checkpoints.iterdir():
                if entry.suffix == ".optimizer" and not entry.with_suffix(".pth").exists():
                    shutil.rmtree(entry, ignore_errors=True)
                elif _LEFT_OVER.fullmatch(entry.name):
                    entry.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(_not_written(path, error)) from error


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
    if not (moments_folder(path.resolve()) / ".metadata").is_file():
        raise UserError(
            f"{path} lacks the optimiser's state {moments_folder(path.resolve()).name} beside it;"
            " copy both."
        )
    return state


def first_line(error: BaseException) -> str:
    """First line of an error's text, for one-line messages."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _not_written(path: Path, error: OSError) -> str:
    reason = error.strerror or first_line(error)
    return (
        f"The checkpoint {path} could not be written: {reason}; older checkpoints are whole: make"
        " room or mend the folder, then repeat the command with --resume."
    )
