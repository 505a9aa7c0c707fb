"""Going on with a run: which checkpoint, whether it fits, where in the schedule it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from greenmim.data.sampler import EpochSampler
from greenmim.mim import GreenMIM
from greenmim.recipe import Recipe, UserError
from greenmim.training.distributed import Processes
from greenmim.training.run_folder import RunFolder, first_line, moments_folder, read_run_checkpoint
from greenmim.training.training_state import read_moments


def find_checkpoint(folder: RunFolder, resume: str | None) -> tuple[Path | None, list[str]]:
    """Where to go on from (None: a new run), and what the user should know about it.

    Raises:
        UserError: the folder cannot be used, or `resume` and what is in it do not go together.
    """
    folder.check_usable()
    if resume is None:
        if folder.holds_run():
            raise UserError(
                f"--work-dir {folder.path} already holds a run; add --resume to go on with it, or"
                " choose another folder."
            )
        return None, []
    if resume == "auto":
        return _newest_whole(folder)
    path = Path(resume)
    if folder.holds_run() and path.resolve().parent != folder.checkpoints.resolve():
        raise UserError(
            f"--work-dir {folder.path} holds a run that {path} is not part of; choose another"
            " folder."
        )
    return path.resolve() if path.is_file() else path, []


def _newest_whole(folder: RunFolder) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that can be read: a disk may have damaged the last one."""
    files = folder.by_step()
    problems: list[str] = []
    for step in sorted(files, reverse=True):
        try:
            read_run_checkpoint(files[step])
            return files[step], problems
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(problems[0])
    return None, []


def check_same_model(state: dict[str, Any], recipe: Recipe, path: Path) -> None:
    """Refuse the checkpoint of another model.

    Raises:
        UserError: the first value that differs is named.
    """
    there, here = state["recipe"]["model"], recipe.to_dict()["model"]
    for name in here:
        if there.get(name) != here[name]:
            raise UserError(
                f"The checkpoint {path} is of another model: {name} is {there.get(name)} there and"
                f" {here[name]} in this recipe."
            )


def restore_moments(
    model: GreenMIM, optimizer: torch.optim.AdamW, checkpoint: Path, processes: Processes
) -> None:
    """Bring the optimiser's state back. A collective.

    Raises:
        UserError: it cannot be read.
    """
    try:
        read_moments(model, optimizer, moments_folder(checkpoint), processes.alone)
    except OSError as error:
        raise processes.common_error(
            f"The optimiser's state of {checkpoint} cannot be read: {first_line(error)}; name an"
            " older checkpoint with --resume."
        ) from error


def place_of(state: dict[str, Any], sampler: EpochSampler, notes: list[str]) -> int:
    """Updates done at the checkpoint's place of the schedule."""
    step, per_epoch, images = state["step"], state["steps_per_epoch"], state["images_per_update"]
    if images != sampler.images_per_update:
        notes.append(
            f"an update has {sampler.images_per_update} images now, {images} in the checkpoint"
            " (--data.batch-size x --optim.accumulate x processes)"
        )
    if per_epoch != sampler.updates_per_epoch:
        step = step * sampler.updates_per_epoch // per_epoch
        notes.append(
            f"an epoch has {sampler.updates_per_epoch} updates now, {per_epoch} in the checkpoint;"
            " the run goes on at the same place of the schedule, epoch"
            f" {step / sampler.updates_per_epoch:.2f}"
        )
    return step


def changes(before: dict[str, Any], recipe: Recipe) -> list[str]:
    """A line on what differs from the recipe of the checkpoint, if anything does."""
    now = recipe.to_dict()
    ignored = ("work_dir", "log", "checkpoint")
    # An option that the version before did not have stands as that version worked.
    known = (name for name in now if name in before and name not in ignored)
    changed = [name for name in known if before[name] != now[name]]
    return [f"changed since the checkpoint: {', '.join(changed)}"] if changed else []
