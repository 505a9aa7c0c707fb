"""Going on with a run: which checkpoint, whether it fits, where in the schedule it stands."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from greenmim.config import ModelConfig
from greenmim.data.sampler import EpochSampler
from greenmim.messages import first_line
from greenmim.mim import GreenMIM
from greenmim.recipe import Recipe, UserError, flat
from greenmim.training.distributed import Processes
from greenmim.training.log_file import read_log
from greenmim.training.run_folder import RunFolder, moments_folder, read_run_checkpoint
from greenmim.training.training_state import moments_sizes, read_moments

# Parts of a recipe that change no number of a run.
UNIMPORTANT = ("work_dir", "log", "checkpoint")


@dataclass(frozen=True)
class Found:
    """Where a run goes on from.

    Attributes:
        checkpoint: None for a new run.
        notes: What the user should know about it.
        state: The checkpoint's content, where it was read already.
    """

    checkpoint: Path | None = None
    notes: list[str] = field(default_factory=list)
    state: dict[str, Any] | None = None


def find_checkpoint(folder: RunFolder, resume: str | None) -> Found:
    """Where to go on from.

    Raises:
        UserError: the folder cannot be used, or `resume` and what is in it do not go together.
    """
    folder.check_usable()
    if resume is None:
        # What ended before its first save, for want of memory perhaps, is begun anew.
        unknown = folder.config.exists() and not folder.log.exists()
        if folder.by_step() or unknown or _lost(folder):
            raise UserError(
                f"--work-dir {folder.path} already holds a run; add --resume to go on with it, or"
                " choose another folder."
            )
        return Found()
    if resume == "auto":
        return _newest_whole(folder)
    path = Path(resume).resolve()
    # A run that starts from another's checkpoint may be killed before it has its own.
    own = path.parent == folder.checkpoints.resolve()
    if not own and (folder.by_step() or (_lost(folder) == "saved" and not folder.owns(path))):
        raise UserError(
            f"--work-dir {folder.path} holds a run that {resume} is not part of; --resume without a"
            " path goes on with that run, or choose another folder."
        )
    return Found(path if path.is_file() else Path(resume))


def _newest_whole(folder: RunFolder) -> Found:
    """The newest checkpoint that can be read: a disk may have damaged the last one."""
    files = folder.by_step()
    problems: list[str] = []
    for step in sorted(files, reverse=True):
        try:
            return Found(files[step], problems, read_run_checkpoint(files[step]))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(problems[0])
    lost = _lost(folder)
    if lost == "saved":
        raise UserError(
            f"--work-dir {folder.path} holds a run whose checkpoints are gone: put them back into"
            f" {folder.checkpoints} (also from set_aside folders in it), or choose another folder."
        )
    if lost == "started elsewhere":
        raise UserError(
            f"The run in --work-dir {folder.path} started from another run's checkpoint and has"
            " none of its own yet: name that checkpoint again, --resume CHECKPOINT."
        )
    return Found()


def _lost(folder: RunFolder) -> str | None:
    """What a folder without checkpoints says of some that were there, if it does."""
    records = read_log(folder.log) if folder.log.exists() else []
    if any(folder.checkpoints.glob("set_aside_*/*.pth")) or any(
        record["event"] == "checkpoint" for record in records
    ):
        return "saved"
    started = [record for record in records if record["event"] == "start"]
    return "started elsewhere" if started and started[-1]["step"] > 0 else None


def check_same_model(state: dict[str, Any], recipe: Recipe, path: Path) -> None:
    """Refuse the checkpoint of another model.

    Raises:
        UserError: the first value that differs is named.
    """
    # An option that the version before did not have stands as that version worked: its default.
    defaults = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
    there, here = state["recipe"]["model"], recipe.to_dict()["model"]
    for name in here:
        before = there.get(name, defaults[name])
        if before != here[name]:
            raise UserError(
                f"The checkpoint {path} is of another model: {name} is {before} there and"
                f" {here[name]} in this recipe."
            )


def restore_moments(
    model: GreenMIM, optimizer: torch.optim.AdamW, checkpoint: Path, processes: Processes
) -> None:
    """Bring the optimiser's state back. A collective.

    Raises:
        UserError: it cannot be read.
    """
    with processes.agreed():
        try:
            moments_sizes(moments_folder(checkpoint))
        except OSError as error:
            raise _unreadable(checkpoint, error) from error
    try:
        read_moments(model, optimizer, moments_folder(checkpoint), processes.alone)
    except OSError as error:
        raise processes.common_error(str(_unreadable(checkpoint, error))) from error


def _unreadable(checkpoint: Path, error: OSError) -> UserError:
    return UserError(
        f"The optimiser's state of {checkpoint} cannot be read: {first_line(error)}; name an"
        " older checkpoint with --resume."
    )


def place_of(state: dict[str, Any], sampler: EpochSampler, notes: list[str]) -> int:
    """Updates done at the checkpoint's place of the schedule, in updates of this run."""
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
    before, now = flat(before), flat(recipe.to_dict())
    # An option that the version before did not have stands as that version worked.
    changed = [
        f"{name} {before[name]} -> {value}"
        for name, value in now.items()
        if name in before and before[name] != value and name.split(".")[0] not in UNIMPORTANT
    ]
    return [f"changed since the checkpoint: {', '.join(changed)}"] if changed else []
