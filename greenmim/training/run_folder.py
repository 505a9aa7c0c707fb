"""The work dir of a run, and its checkpoints: saved, removed, found, read, resumed from.

A checkpoint is a file `step_N.pth` and a folder `step_N.optimizer`. The folder is written first,
and the file is renamed into place last: a checkpoint is complete where its file is, whatever killed
the run. The folder holds the optimiser's moments. Every process writes its part; any other number
of processes, under either strategy, reads them.

N counts the updates ever done, and only grows. The schedule's own count is converted when a run
resumes with another number of updates per epoch.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import nn

from greenmim.checkpoint import (
    free_name,
    load_checkpoint,
    run_command,
    save_atomic,
    save_text,
    sync_folder,
)
from greenmim.config import ModelConfig
from greenmim.data.sampler import EpochSampler
from greenmim.guards import UserError, first_line
from greenmim.processes import Processes
from greenmim.recipe import CheckpointConfig, RunRecipe, flat
from greenmim.sharded import load_sharded, save_sharded, sharded_sizes
from greenmim.training.folder_lock import FolderLock, writing
from greenmim.training.log import read_log

RUN_VERSION = 2
MOMENTS = ("exp_avg", "exp_avg_sq")
# Recipe values whose change is not reported at a resume.
UNIMPORTANT = ("work_dir", "init", "log", "checkpoint", "data.val_root", "data.probe_root")
_MOMENTS_FOLDER = re.compile(r"step_\d+\.optimizer")
_LEFT_OVER = re.compile(r"\.(step_\d+\.pth|last)\.\d+")
_STEP_FILE = re.compile(r"step_(\d+)\.pth")


class RunFolder:
    """config.yaml, log.jsonl, tensorboard/ and checkpoints/ of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.log = self.path / "log.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.last = self.checkpoints / "last.pth"
        self.lock = FolderLock(self.path)
        self.epochs: dict[Path, float] = {}  # of checkpoints that were read so far
        self._found: set[int] | None = None

    def by_step(self) -> dict[int, Path]:
        """The checkpoints by the number of updates done."""
        if not self.checkpoints.is_dir():
            return {}
        found = ((_STEP_FILE.fullmatch(file.name), file) for file in self.checkpoints.iterdir())
        return {int(match[1]): file for match, file in found if match}

    def newest_checkpoint(self) -> Path | None:
        """The checkpoint with the most steps."""
        files = self.by_step()
        return files[max(files)] if files else None

    def owns(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is one of this run, set aside or not."""
        return self.checkpoints.resolve() in checkpoint.resolve().parents

    def check_usable(self) -> None:
        """Raises UserError where the folder cannot be made and written to; writes nothing.

        `start` refuses if checkpoints appear or vanish after this.
        """
        parent = self._nearest()
        if not parent.is_dir():
            raise UserError(f"--work-dir {self.path} cannot be made: {parent} is a file.")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise UserError(f"--work-dir {self.path} cannot be written: no permission in {parent}.")
        self._found = set(self.by_step())

    def check_room(self, keep: CheckpointConfig, num_bytes: int) -> None:
        """Raises UserError where the disk cannot hold checkpoints of `num_bytes` each."""
        free = self._free_bytes()
        # The new one is complete before the oldest is removed.
        most = keep.keep_last + 1
        if free is None or free >= most * num_bytes:
            return
        more = max(most - num_removable(self, keep), 1)
        if free < more * num_bytes:
            raise UserError(
                f"--work-dir {self.path}: a checkpoint takes {num_bytes / 1e6:.0f} MB, the run"
                f" needs room for {more} and the disk has {free / 1e6:.0f} MB left; free some,"
                " choose another folder or a lower --checkpoint.keep-last."
            )

    def _free_bytes(self) -> int | None:
        """Bytes left on the disk; None where it does not say."""
        usage = shutil.disk_usage(self._nearest())
        return usage.free if usage.total else None

    def _nearest(self) -> Path:
        return next(p for p in (self.path.absolute(), *self.path.absolute().parents) if p.exists())

    def start(self, recipe: RunRecipe, resumed_at: int) -> None:
        """Make the folder and save the resolved recipe.

        Checkpoints after update `resumed_at`, which the run leaves behind, are set aside.

        Raises:
            UserError: the system refuses, or another command was here since `check_usable`.
        """
        text = "# Resolved recipe of this run; pass it back with --config.\n" + yaml.safe_dump(
            recipe.to_dict(), sort_keys=False
        )
        if self._found is not None and set(self.by_step()) != self._found:
            raise UserError(
                f"Another command wrote checkpoints in --work-dir {self.path} while this one"
                " started; repeat the command."
            )
        with writing(self.path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            save_text(text, self.config)
            self._set_aside(resumed_at)

    def point_last_to(self, path: Path) -> str | None:
        """Point last.pth to a checkpoint; returns why that failed, or None.

        It is for people: no code needs it, and some file systems have no links.
        """
        link = self.checkpoints / f".last.{os.getpid()}"
        try:
            link.unlink(missing_ok=True)
            link.symlink_to(path.name)
            os.replace(link, self.last)
        except OSError as error:
            return f"{self.last} could not be linked to the newest checkpoint: {error.strerror}"
        return None

    def _set_aside(self, resumed_at: int) -> None:
        later = [file for step, file in self.by_step().items() if step > resumed_at]
        if not later:
            return
        aside = free_name(self.checkpoints, "set_aside_{}")
        aside.mkdir()
        for file in later:  # its moments first: alone they would count as left over
            if moments_folder(file).exists():
                os.replace(moments_folder(file), aside / moments_folder(file).name)
            os.replace(file, aside / file.name)
            self.epochs.pop(file, None)  # another checkpoint may get this name
        newest = self.newest_checkpoint()
        if newest is not None:
            self.point_last_to(newest)
        else:
            self.last.unlink(missing_ok=True)


def moments_folder(checkpoint: Path) -> Path:
    """Where the optimiser's state of a checkpoint is."""
    return checkpoint.with_suffix(".optimizer")


# ---- written and removed ------------------------------------------------------------------------


def save(
    folder: RunFolder,
    state: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    keep: CheckpointConfig | None,
    processes: Processes,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Path, str | None]:
    """Write the checkpoint of `state["updates"]`, link last.pth to it, remove the oldest ones.

    A collective; the file holds the main process's `state`. `keep` None removes nothing; `say` gets
    problems that do no harm.

    Returns:
        The checkpoint, and why it could not be written (disk full, folder gone) or None, the same
        in all processes. Older checkpoints are then untouched.

    Raises:
        UserError: another command has taken the folder.
    """
    path = folder.checkpoints / f"step_{state['updates']:08d}.pth"
    moments = moments_folder(path)

    def commit() -> None:
        sync_folder(moments)
        # Fails where another machine wrote its part to another file system.
        whole = {**state, "moments": sharded_sizes(moments)}
        folder.lock.check_ours()  # the moments may have taken long
        save_atomic(whole, path)

    def tidy() -> None:
        if problem is None:
            if why := folder.point_last_to(path):
                say(why)
            if keep is not None:
                folder.lock.check_ours()
                if why := _problem(lambda: _remove_old(folder, keep)):
                    say(f"an old checkpoint in {folder.checkpoints} could not be removed: {why}")
        elif not path.exists():
            shutil.rmtree(moments, ignore_errors=True)

    problem = processes.from_main(lambda: _problem(lambda: _remove_left_overs(folder)))
    if problem is None:
        problem = _problem(lambda: write_moments(model, optimizer, moments, processes.alone))
    if problem is None:
        problem = processes.from_main(lambda: _problem(commit))
    processes.from_main(tidy)
    return path, problem


def num_removable(folder: RunFolder, keep: CheckpointConfig) -> int:
    """Number of checkpoints that newer ones will replace."""
    files = folder.by_step().values()
    return sum(not _is_milestone(folder, file, keep.keep_every_epochs) for file in files)


def _problem(work: Callable[[], object]) -> str | None:
    """Do some work; returns why the system refused it, or None."""
    try:
        work()
    except OSError as error:
        return error.strerror or first_line(error)
    return None


def _remove_old(folder: RunFolder, keep: CheckpointConfig) -> None:
    files = folder.by_step()
    for step in sorted(files)[: -keep.keep_last]:
        if not _is_milestone(folder, files[step], keep.keep_every_epochs):
            files[step].unlink()  # before its moments: see the module's head
            shutil.rmtree(moments_folder(files[step]), ignore_errors=True)


def _is_milestone(folder: RunFolder, path: Path, every_epochs: int | None) -> bool:
    if every_epochs is None:
        return False
    if path not in folder.epochs:
        try:
            state = load_checkpoint(path, lazily=True)
            folder.epochs[path] = state["step"] / state["steps_per_epoch"]
        except Exception:  # anything, of a damaged file: it stays for the user to look at
            return True
    return folder.epochs[path] % every_epochs == 0


def _remove_left_overs(folder: RunFolder) -> None:
    """What saves that were killed left: folders without their file, and temporary files."""
    folder.lock.check_ours()
    for entry in folder.checkpoints.iterdir():
        if _MOMENTS_FOLDER.fullmatch(entry.name):
            if not entry.with_suffix(".pth").exists():
                shutil.rmtree(entry, ignore_errors=True)
        elif _LEFT_OVER.fullmatch(entry.name):
            entry.unlink(missing_ok=True)


# ---- found and read -----------------------------------------------------------------------------


class Found(NamedTuple):
    """Where a run resumes from, None for a new run; its content, if it was read already."""

    checkpoint: Path | None = None
    notes: tuple[str, ...] = ()
    state: dict[str, Any] | None = None

    def content(self, command: str) -> dict[str, Any] | None:
        """The checkpoint's, read now if it was not yet; None for a new run. Raises UserError."""
        if self.checkpoint and self.state is None:
            return read_run_checkpoint(self.checkpoint, command)
        return self.state


def find_checkpoint(folder: RunFolder, resume: str | None, command: str = "pretrain") -> Found:
    """Where a command's run resumes from.

    Raises:
        UserError: `resume` and what is in the folder do not agree.
    """
    folder.check_usable()
    if resume is None:
        # A run that ended before its first save is started anew.
        unknown = folder.config.exists() and not folder.log.exists()
        if folder.by_step() or unknown or _lost(folder):
            raise UserError(
                f"--work-dir {folder.path} already holds a run; add --resume to continue it, or"
                " choose another folder."
            )
        return Found()
    if resume == "auto":
        return _newest_whole(folder, command)
    path = Path(resume).resolve()
    # A run that starts from another's checkpoint may be killed before it has its own.
    own = path.parent == folder.checkpoints.resolve()
    is_aside = path.is_file() and path.parent.name.startswith("set_aside_")
    if folder.by_step() and folder.owns(path) and is_aside:
        raise UserError(
            f"{resume} was set aside when the run went back to an earlier one; to continue from it,"
            " choose another --work-dir."
        )
    if not own and (folder.by_step() or (_lost(folder) == "saved" and not folder.owns(path))):
        raise UserError(
            f"--work-dir {folder.path} holds a run that {resume} is not part of; --resume without a"
            " path continues that run, or choose another folder."
        )
    return Found(path if path.is_file() else Path(resume))


def _newest_whole(folder: RunFolder, command: str) -> Found:
    """The newest checkpoint that can be read: a disk may have damaged the last one."""
    files = folder.by_step()
    problems: list[str] = []
    for step in sorted(files, reverse=True):
        try:
            return Found(files[step], tuple(problems), read_run_checkpoint(files[step], command))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(problems[0])
    lost = _lost(folder)
    if lost == "saved":
        raise UserError(
            f"--work-dir {folder.path} holds a run whose checkpoints are gone: put them back into"
            f" {folder.checkpoints} (set_aside folders there may have them), or choose another."
        )
    if lost:
        raise UserError(
            f"The run in --work-dir {folder.path} started from another run's checkpoint and has"
            " none of its own yet: name that checkpoint again, --resume CHECKPOINT."
        )
    return Found()


def _lost(folder: RunFolder) -> str | None:
    """What the log says of checkpoints that are no longer there, if anything."""
    records = read_log(folder.log) if folder.log.exists() else []
    saved = any(record["event"] == "checkpoint" for record in records)
    if saved or any(folder.checkpoints.glob("set_aside_*/*.pth")):
        return "saved"
    starts = [record["step"] for record in records if record["event"] == "start"]
    return "started elsewhere" if starts and starts[-1] > 0 else None


def read_run_checkpoint(path: str | Path, command: str = "pretrain") -> dict[str, Any]:
    """A checkpoint written by a run of the command; UserError for any other file, or none."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}.")
    try:
        state = load_checkpoint(path)
    except Exception as error:  # pickle, zip and torch raise anything on a damaged file
        raise UserError(f"The checkpoint {path} cannot be read: {first_line(error)}") from error
    if run_command(state) != command:
        advice = "; --init starts from its encoder" if command == "finetune" else ""
        raise UserError(
            f"{path} was not written by `greenmim {command}`; a run cannot resume from it{advice}."
        )
    if state.get("version") != RUN_VERSION:
        raise UserError(
            f"{path} has format {state.get('version')} of greenmim {state.get('greenmim')}, and"
            f" this version resumes from format {RUN_VERSION} only; install that version."
        )
    if missing := [name for name in ("images_per_update", "skipped") if name not in state]:
        raise UserError(f"{path} is damaged: it lacks its {missing[0]}; resume from an older one.")
    # --resume may name a link, such as last.pth; the moments are beside its target.
    moments = moments_folder(path.resolve())
    if not (moments / ".metadata").is_file():
        raise UserError(
            f"{path} lacks the optimiser's state {moments.name} beside it; copy the folder too."
        )
    for name, size in state.get("moments", {}).items():
        file = moments / name
        if not file.is_file() or file.stat().st_size != size:
            there = f"{file.stat().st_size} bytes" if file.is_file() else "not there"
            raise UserError(
                f"The optimiser's state of {path} is damaged: {moments.name}/{name} is {there},"
                f" it was {size} bytes; resume from an older one."
            )
    return state


def check_same_model(state: dict[str, Any], recipe: RunRecipe, path: Path) -> None:
    """Raises UserError for the checkpoint of another model; names the first difference."""
    saved = state["recipe"]["model"], recipe.to_dict()["model"]
    there, here = map(ModelConfig.of_saved, saved)
    for field in dataclasses.fields(recipe.model):
        before, now = (getattr(config, field.name) for config in (there, here))
        if before != now:
            raise UserError(
                f"The checkpoint {path} is of another model: {field.name} is {before} there and"
                f" {now} in this recipe; set --model.{field.name.replace('_', '-')} to that, or"
                " start a new run without --resume."
            )


def restore_moments(
    model: nn.Module, optimizer: torch.optim.AdamW, checkpoint: Path, processes: Processes
) -> None:
    """Load the optimiser's state; UserError where it cannot be read. A collective."""
    folder = moments_folder(checkpoint)

    def told(problem: str) -> str:
        why = f"The optimiser's state of {checkpoint} cannot be read: {problem}"
        return f"{why}; name an older checkpoint with --resume."

    with processes.agreed():  # a file that one process cannot see would leave the others waiting
        if problem := _problem(lambda: sharded_sizes(folder)):
            raise UserError(told(problem))
    if problem := _problem(lambda: read_moments(model, optimizer, folder, processes.alone)):
        raise processes.common_error(told(problem))


class Progress(NamedTuple):
    """How far a run has come."""

    first_step: int = 0  # updates done, in the schedule's count
    shift: int = 0  # updates ever done, less first_step
    resumed_at: int = 0  # updates ever done at the folder's own checkpoint that it goes on from
    skipped: int = 0  # updates skipped so far
    notes: tuple[str, ...] = ()  # what the user should know about it


def progress_of(
    state: dict[str, Any], recipe: RunRecipe, sampler: EpochSampler, checkpoint: Path, own: bool
) -> Progress:
    """How far a run has come, by the checkpoint it resumes from; `own` if it is the folder's.

    Raises:
        UserError: another run's checkpoint is at the end of this one.
    """
    step, per_epoch, images = state["step"], state["steps_per_epoch"], state["images_per_update"]
    updates, notes = state.get("updates", step), []
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
    if not own and step >= sampler.total_updates:
        raise UserError(
            f"{checkpoint} is at or beyond the end of {recipe.epochs} epochs; raise --epochs to"
            " train further."
        )
    before, now = flat(state["recipe"]), flat(recipe.to_dict())
    # An option that the version before did not have stands as that version worked.
    changed = [
        f"{name} {before[name]} -> {value}"
        for name, value in now.items()
        if name in before
        and before[name] != value
        and {name, name.split(".")[0]}.isdisjoint(UNIMPORTANT)
    ]
    if changed:
        notes.append(f"changed since the checkpoint: {', '.join(changed)}")
    notes.append(f"resumed after update {updates} from {checkpoint}")
    resumed_at = updates if own else 0
    return Progress(step, updates - step, resumed_at, state["skipped"], tuple(notes))


def write_moments(
    model: nn.Module, optimizer: torch.optim.AdamW, folder: Path, alone: bool
) -> None:
    """Write AdamW's state into a new folder; see `save_sharded`."""
    save_sharded(_moments(model, optimizer), folder, alone)


def read_moments(model: nn.Module, optimizer: torch.optim.AdamW, folder: Path, alone: bool) -> None:
    """Read AdamW's state from a folder of `write_moments`; see `load_sharded`."""
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        optimizer.state[parameter] = {
            # As the fused AdamW starts them.
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            **{name: torch.zeros_like(parameter, requires_grad=False) for name in MOMENTS},
        }
    load_sharded(_moments(model, optimizer), folder, alone)


def _moments(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {f"{name}/{key}": t for name, p in trained for key, t in optimizer.state[p].items()}
