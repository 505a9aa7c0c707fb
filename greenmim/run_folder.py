"""The folder of a run: what is in it, how checkpoints are written, found and removed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from greenmim.checkpoint import load_checkpoint, save_atomic
from greenmim.recipe import CheckpointConfig, Recipe, UserError

RUN_FORMAT = "greenmim.pretrain"
_STEP_FILE = re.compile(r"step_(\d+)\.pth")


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
        return self.config.exists() or self.log.exists() or bool(self._by_step())

    def newest_checkpoint(self) -> Path | None:
        """The checkpoint `last.pth` points to, or else the one with the most steps."""
        if self.last.exists():
            return self.last.resolve()
        files = self._by_step()
        return files[max(files)] if files else None

    def check_usable(self) -> None:
        """Find out without writing anything whether the folder can be made and written to.

        Raises:
            UserError: it cannot.
        """
        place = self.path.absolute()
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            raise UserError(f"--work-dir {self.path} cannot be made: {place} is a file.")
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError(f"--work-dir {self.path} cannot be written: no permission in {place}.")

    def start(self, recipe: Recipe) -> None:
        """Make the folder and save the resolved recipe.

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
        except OSError as error:
            raise UserError(
                f"--work-dir {self.path} cannot be written: {error.strerror}."
            ) from error

    def save(self, state: dict[str, Any], keep: CheckpointConfig) -> Path:
        """Write a checkpoint of `state["step"]`, point last.pth to it, remove the oldest ones.

        Raises:
            UserError: it cannot be written (disk full, folder gone); older ones are untouched.
        """
        path = self.checkpoints / f"step_{state['step']:08d}.pth"
        try:
            save_atomic(state, path)
            link = self.checkpoints / f".last.{os.getpid()}"
            link.unlink(missing_ok=True)
            link.symlink_to(path.name)
            os.replace(link, self.last)
        except OSError as error:
            raise UserError(f"The checkpoint {path} could not be written: {error}.") from error
        self._remove_old(path, keep, state["steps_per_epoch"])
        return path

    def _remove_old(self, newest: Path, keep: CheckpointConfig, steps_per_epoch: int) -> None:
        files = self._by_step()
        for step in sorted(files)[: -keep.keep_last]:
            period = keep.keep_every_epochs and keep.keep_every_epochs * steps_per_epoch
            if files[step] != newest and not (period and step % period == 0):
                files[step].unlink(missing_ok=True)

    def _by_step(self) -> dict[int, Path]:
        if not self.checkpoints.is_dir():
            return {}
        found = ((_STEP_FILE.fullmatch(file.name), file) for file in self.checkpoints.iterdir())
        return {int(match[1]): file for match, file in found if match}


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
    return state


def first_line(error: BaseException) -> str:
    """First line of an error's text, for one-line messages."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
