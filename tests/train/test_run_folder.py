"""A run's folder when things change or fail: other batches, lost and damaged files, bad disks."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import sys
import types
from pathlib import Path
from signal import SIGTERM

import pytest
import torch
import torch.distributed.checkpoint as dcp
from crew import Crew, command, losses, records
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from greenmim.checkpoint import sync_folder
from greenmim.cli import main
from greenmim.guards import UserError
from greenmim.launch import World
from greenmim.processes import Processes
from greenmim.recipe import CheckpointConfig, DataConfig, Recipe
from greenmim.sharded import sharded_sizes
from greenmim.training import run_folder
from greenmim.training.log import LogFile, RunLog, cut_log, read_log
from greenmim.training.run_folder import (
    Found,
    RunFolder,
    check_same_model,
    find_checkpoint,
    num_removable,
    write_moments,
)
from greenmim.training.slurm import Piece
from greenmim.training.train import Trainer

ALONE = Processes(World(), torch.device("cpu"))
KILLED = 9


def save(
    folder: RunFolder, step: int, keep: CheckpointConfig, shift: int = 0, per_epoch: int = 3
) -> str | None:
    """Write a checkpoint of a small model; why it failed."""
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    state = {"step": step, "updates": step + shift, "steps_per_epoch": per_epoch}
    return run_folder.save(folder, state, model, optimizer, keep, ALONE)[1]


@pytest.fixture
def copy(finished_run: Path, tmp_path: Path) -> Path:
    """The folder of a run of 2 epochs of 4 updates, a checkpoint after each."""
    shutil.copytree(finished_run, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch):
    """End a run abruptly in its n-th update; what it had in memory is gone."""

    def arrange(updates: int) -> None:
        done, real = 0, RunLog.step_done

        def step_done(log: RunLog) -> None:
            nonlocal done
            done += 1
            if done == updates:
                raise SystemExit(KILLED)
            real(log)

        monkeypatch.setattr(RunLog, "step_done", step_done)

    return arrange


# ---- another number of updates per epoch --------------------------------------------------------


def test_resumed_with_a_larger_batch_nothing_is_lost(
    copy: Path, tiny: Path, photos: Path, killed_at, capsys
) -> None:
    """4 updates per epoch, then 2: update 8 is update 4 of the schedule, and stays number 8."""
    folder, before = RunFolder(copy), losses(copy)
    files = set(folder.checkpoints.iterdir())
    argv = command(tiny, photos, copy, "--resume", "--epochs", "4", "--data.batch-size", "6")
    killed_at(2)
    assert main(argv) == KILLED
    assert "resumed after update 8" in capsys.readouterr().out
    assert set(folder.checkpoints.iterdir()) == files and folder.last.exists()
    assert {step: losses(copy)[step] for step in before} == before
    killed_at(0)
    more = ("--checkpoint.keep-last", "9", "--checkpoint.every-steps", "1")
    assert main([*argv, *more]) == 0
    text = capsys.readouterr().out
    assert "resumed after update 8" in text and "step     12/12  epoch 4.00" in text
    assert list(losses(copy)) == list(range(1, 13)) and sorted(folder.by_step())[-1] == 12
    state = torch.load(folder.last, weights_only=True)
    assert (state["step"], state["updates"], state["steps_per_epoch"]) == (8, 12, 2)
    events = EventAccumulator(str(copy / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 13))
    # From an older one of either count, what is later is set aside, and nothing else.
    older = str(folder.checkpoints / "step_00000010.pth")
    assert main([*argv[:-5], "--resume", older, *argv[-4:]]) == 0
    aside = folder.checkpoints / "set_aside_1"
    assert sorted(p.name for p in aside.glob("*.pth")) == ["step_00000011.pth", "step_00000012.pth"]
    later = str(aside / "step_00000011.pth")
    assert main([*argv[:-5], "--resume", later, *argv[-4:]]) == 2
    assert "was set aside when the run went back" in capsys.readouterr().err
    none = str(folder.checkpoints / "typo" / "step_00000011.pth")
    assert main([*argv[:-5], "--resume", none, *argv[-4:]]) == 2
    assert "is not part of" in capsys.readouterr().err
    assert list(losses(copy)) == list(range(1, 13)) and 12 in folder.by_step()


def test_a_log_with_damaged_lines_is_resumed(copy: Path, tiny: Path, photos: Path, capsys) -> None:
    log, before = copy / "log.jsonl", losses(copy)
    lines = [b"null", b"3", b"[]", b'{"step": 3}', b'{"event": "train", "step": null}',
             b'{"event": "unreadable_image"}', b"\xff\xfe"]  # fmt: skip
    whole = log.read_bytes() + b"\n".join(lines) + b"\n"
    log.write_bytes(whole)
    assert main(command(tiny, photos, copy, "--resume", "--epochs", "3")) == 0
    assert losses(copy).keys() == set(range(1, 13))
    assert {step: losses(copy)[step] for step in before} == before
    assert (copy / "log.1.jsonl").read_bytes() == whole


def test_a_run_that_is_stopped_before_its_next_save_names_the_last_one(
    copy: Path, tiny: Path, photos: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(Trainer, "update", lambda self, step: os.kill(os.getpid(), SIGTERM))
    assert main(command(tiny, photos, copy, "--resume", "--epochs", "3")) == 75
    said = capsys.readouterr().out
    assert "SIGTERM received: saved" in said and "step_00000008.pth; repeat the command" in said


def test_resumed_with_a_smaller_batch_milestones_stay(copy: Path, tiny: Path, photos: Path) -> None:
    """4 updates per epoch, then 12: the ends of epochs are 4, 8 and 20."""
    more = ("--epochs", "3", "--data.batch-size", "1", "--checkpoint.every-steps", "5")
    keep = ("--checkpoint.keep-last", "1", "--checkpoint.keep-every-epochs", "1")
    assert main(command(tiny, photos, copy, "--resume", *more, *keep)) == 0
    assert sorted(RunFolder(copy).by_step()) == [4, 8, 20]
    assert list(losses(copy)) == list(range(1, 21))


def test_milestones_of_both_counts_are_kept(tmp_path: Path) -> None:
    keep = CheckpointConfig(keep_last=1, keep_every_epochs=2)
    for step in range(3, 16, 3):
        assert save(RunFolder(tmp_path), step, keep) is None  # epochs 1 to 5, numbers 3 to 15
    folder = RunFolder(tmp_path)
    for step in range(6, 9):  # epochs 6 to 8, numbers 16 to 18
        assert save(folder, step, keep, shift=10, per_epoch=1) is None
    assert sorted(folder.by_step()) == [6, 12, 16, 18]


# ---- where a run goes on from -------------------------------------------------------------------


def test_a_run_whose_checkpoints_are_gone_is_not_started_over(
    copy: Path, tiny: Path, photos: Path, tmp_path: Path, capsys
) -> None:
    aside = copy / "checkpoints" / "set_aside_1"
    aside.mkdir()
    for file in [*copy.glob("checkpoints/step_*")]:
        file.rename(aside / file.name)
    log, argv = (copy / "log.jsonl").read_bytes(), command(tiny, photos, copy, "--resume")
    assert main(argv) == 2
    assert "whose checkpoints are gone: put them back into" in capsys.readouterr().err
    assert (copy / "log.jsonl").read_bytes() == log
    # Also where only one of the two traces is left.
    (copy / "log.jsonl").unlink()
    assert main(argv) == 2
    shutil.rmtree(aside)
    (copy / "log.jsonl").write_bytes(log)
    assert main(argv) == 2
    foreign = tmp_path / "other" / "step_00000001.pth"
    assert main([*argv, str(foreign)]) == 2 and "not part of" in capsys.readouterr().err
    assert (copy / "log.jsonl").read_bytes() == log


def test_killed_before_its_first_save_a_run_starts_over(
    tiny: Path, photos: Path, tmp_path: Path, killed_at
) -> None:
    argv = command(tiny, photos, tmp_path / "run", "--resume", "--epochs", "1")
    killed_at(3)
    assert main(argv) == KILLED
    killed_at(0)
    assert main(argv) == 0
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4]


def test_a_run_from_another_runs_checkpoint_killed_before_its_first_save(
    finished_run: Path, tiny: Path, photos: Path, tmp_path: Path, killed_at, monkeypatch, capsys
) -> None:
    origin = str(finished_run / "checkpoints" / "step_00000002.pth")
    run = tmp_path / "warm"
    argv = command(tiny, photos, run, "--resume")
    piece = Piece(Recipe(work_dir=str(run), data=DataConfig(root="x")), origin)
    killed_at(2)
    assert main([*argv, origin]) == KILLED
    assert piece.where_to_resume() == origin
    assert main(argv) == 2  # not from random weights
    assert "name that checkpoint again" in capsys.readouterr().err
    killed_at(0)
    assert main([*argv, origin]) == 0
    assert losses(run) == {n: loss for n, loss in losses(finished_run).items() if n > 2}
    assert len(records(run, "start")) == 1
    assert piece.where_to_resume() == "auto"
    assert main([*argv, origin]) == 2 and "not part of" in capsys.readouterr().err
    # An older checkpoint of the run itself: the first piece goes back to it, later ones go on.
    own = str(run / "checkpoints" / "step_00000008.pth")
    piece = Piece(piece.recipe, own)
    assert piece.where_to_resume() == own
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert piece.where_to_resume() == "auto"
    assert Piece(piece.recipe, None).where_to_resume() == "auto"


def test_a_folder_that_changed_since_it_was_looked_at(copy: Path) -> None:
    recipe = Recipe(work_dir=str(copy), data=DataConfig(root="x"))
    folder, before = RunFolder(copy), (copy / "config.yaml").read_bytes()
    folder.check_usable()
    save(RunFolder(copy), 9, CheckpointConfig(keep_last=9))
    with pytest.raises(UserError, match="while this one started; repeat the command"):
        folder.start(recipe, 8)
    assert (copy / "config.yaml").read_bytes() == before and 9 in folder.by_step()


def test_the_checkpoint_is_read_once(copy: Path, tiny: Path, photos: Path, monkeypatch) -> None:
    read, real = [], run_folder.load_checkpoint
    monkeypatch.setattr(run_folder, "load_checkpoint", lambda path: read.append(path) or real(path))
    more = ("--resume", "--epochs", "3", "--checkpoint.keep-every-epochs", "null")
    assert main(command(tiny, photos, copy, *more)) == 0
    assert [path.name for path in read] == ["step_00000008.pth"]


def test_an_option_that_the_checkpoint_does_not_know_has_its_default(finished_run: Path) -> None:
    path = finished_run / "checkpoints" / "step_00000008.pth"
    state = torch.load(path, weights_only=True)
    recipe = Recipe(work_dir="x", data=DataConfig(root="x"))
    state["recipe"]["model"] = recipe.to_dict()["model"]
    del state["recipe"]["model"]["drop_path"]
    check_same_model(state, recipe, path)
    other = recipe.to_dict()["model"] | {"drop_path": 0.25}
    recipe.model = type(recipe.model)(**other)
    with pytest.raises(UserError, match=r"drop_path is 0\.0 there and 0\.25"):
        check_same_model(state, recipe, path)


# ---- damaged and crafted files ------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["shorter", "missing"])
def test_damaged_moments_are_passed_over(harm: str, copy: Path) -> None:
    (file,) = (copy / "checkpoints" / "step_00000008.optimizer").glob("*.distcp")
    if harm == "shorter":
        os.truncate(file, file.stat().st_size - 1)
    else:
        file.unlink()
    found = find_checkpoint(RunFolder(copy), "auto")
    assert found.checkpoint.name == "step_00000007.pth"
    (note,) = found.notes
    assert "step_00000008.pth is damaged" in note and file.name in note


class Bomb:
    """What a pickle can do."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_metadata_of_moments_cannot_run_code(
    copy: Path, tiny: Path, photos: Path, tmp_path: Path, capsys
) -> None:
    path, marker = copy / "checkpoints" / "step_00000008.optimizer" / ".metadata", tmp_path / "ran"
    whole, argv = path.read_bytes(), command(tiny, photos, copy, "--resume", "--epochs", "3")

    def complaint(metadata: object) -> str:
        path.write_bytes(pickle.dumps(metadata))
        # The size of the file is that of its checkpoint: somebody took care of that.
        state = torch.load(path.parent.with_suffix(".pth"), weights_only=True)
        state["moments"][".metadata"] = path.stat().st_size
        torch.save(state, path.parent.with_suffix(".pth"))
        assert main(argv) == 2
        return capsys.readouterr().err

    metadata = pickle.loads(whole)
    metadata.planner_data = Bomb(marker)
    assert "names posix.mkdir, which may run code" in complaint(metadata)
    # An entry of bytes, which PyTorch would unpickle where a tensor is expected.
    metadata = pickle.loads(whole)
    key = next(iter(metadata.state_dict_metadata))
    metadata.state_dict_metadata[key] = BytesStorageMetadata()
    assert "BytesStorageMetadata, which may run code" in complaint(metadata)
    metadata = pickle.loads(whole)
    for entry in metadata.storage_data.values():
        entry.relative_path = "../elsewhere"
    assert "names the file ../elsewhere" in complaint(metadata)
    assert not marker.exists()
    path.write_bytes(pickle.dumps(pickle.loads(whole)))
    assert sharded_sizes(path.parent).keys() == {".metadata", "__0_0.distcp"}


def test_a_part_of_the_moments_that_another_machine_wrote_elsewhere(
    tmp_path: Path, monkeypatch
) -> None:
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()

    def write(model: object, optimizer: object, path: Path, alone: bool) -> None:
        dcp.save({"a": torch.zeros(2)}, storage_writer=dcp.FileSystemWriter(path), no_dist=True)
        next(path.glob("*.distcp")).unlink()

    monkeypatch.setattr(run_folder, "write_moments", write)
    problem = save(folder, 1, CheckpointConfig())
    assert "every machine of a run has to see the same folder" in problem
    assert not list(folder.checkpoints.iterdir())


def test_folders_of_the_user_stay(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (folder.checkpoints / "best.optimizer").mkdir(parents=True)
    (folder.checkpoints / "step_00000001.optimizer").mkdir()
    assert save(folder, 2, CheckpointConfig()) is None
    names = {path.name for path in folder.checkpoints.iterdir()}
    assert "best.optimizer" in names and "step_00000001.optimizer" not in names


# ---- disks and file systems ---------------------------------------------------------------------


def test_a_file_system_without_links_and_sync_of_folders(
    tiny: Path, photos: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    real = os.fsync

    def fsync(number: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{number}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(number)

    def symlink(*names: object, **_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted", *names)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "symlink", symlink)
    run = tmp_path / "run"
    argv = command(tiny, photos, run, "--checkpoint.every-steps", "1", "--resume")
    assert main([*argv, "--epochs", "1"]) == 0
    text = capsys.readouterr().out
    assert (
        text.count("could not be linked to the newest") == 1 and "Operation not permitted" in text
    )
    assert main(argv) == 0 and "resumed after update 4" in capsys.readouterr().out
    assert not (run / "checkpoints" / "last.pth").is_symlink()


def test_an_old_checkpoint_that_stays_is_told_once(
    tiny: Path, photos: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name.endswith(".pth") and path.name.startswith("step"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        real(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    assert main(command(tiny, photos, tmp_path / "run", "--checkpoint.every-steps", "1")) == 0
    text = capsys.readouterr().out
    assert text.count("run/checkpoints could not be removed: Permission denied") == 1
    assert len(RunFolder(tmp_path / "run").by_step()) == 8


def test_epochs_of_checkpoints_that_were_set_aside_are_forgotten(copy: Path) -> None:
    """Another checkpoint may get the name of one of them."""
    folder = RunFolder(copy)
    first, *later = sorted(folder.by_step().values())
    folder.epochs = dict.fromkeys((first, *later), 1.0)
    step = min(folder.by_step())
    folder.start(Recipe(work_dir=str(copy), data=DataConfig(root="x")), step)
    assert later and list(folder.epochs) == [first]


def test_moments_that_were_set_aside_alone_are_not_lost(copy: Path, monkeypatch) -> None:
    """Killed between the two: the folder would count as left over, the file does not."""
    folder, real = RunFolder(copy), os.replace

    def replace(source: Path, target: Path) -> None:
        real(source, target)
        if source.name == "step_00000008.optimizer":
            raise SystemExit(KILLED)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(SystemExit):
        folder.start(Recipe(work_dir=str(copy), data=DataConfig(root="x")), 7)
    monkeypatch.undo()
    assert save(folder, 9, CheckpointConfig(keep_last=9)) is None  # which removes what is left over
    assert (folder.checkpoints / "step_00000008.pth").exists()
    assert (folder.checkpoints / "set_aside_1" / "step_00000008.optimizer").exists()


def test_other_errors_of_sync_count(tmp_path: Path, monkeypatch) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)


@pytest.fixture
def bad_saves(monkeypatch: pytest.MonkeyPatch):
    """Let the chosen saves (from 1) fail, as on a network file system that is away."""

    def arrange(*chosen: int) -> None:
        calls, real = 0, write_moments

        def write(*args, **kwargs) -> None:
            nonlocal calls
            calls += 1
            if calls in chosen:
                raise OSError(errno.ESTALE, "Stale file handle")
            real(*args, **kwargs)

        monkeypatch.setattr(run_folder, "write_moments", write)

    return arrange


def test_a_save_that_fails_is_told_and_the_next_one_counts(
    finished_run: Path, tiny: Path, photos: Path, tmp_path: Path, bad_saves, capsys
) -> None:
    bad_saves(1, 2, 4, 5)  # never three in a row
    run = tmp_path / "run"
    assert main(command(tiny, photos, run, "--checkpoint.every-steps", "1")) == 0
    text = capsys.readouterr().out
    assert text.count("Stale file handle; older ones are intact. The run continues") == 4
    assert [r["step"] for r in records(run, "not_saved")] == [1, 2, 4, 5]
    assert [r["step"] for r in records(run, "checkpoint")] == [3, 6, 7, 8]
    assert losses(run) == losses(finished_run)


@pytest.mark.parametrize(
    ("every", "chosen", "failed"), [("1", (2, 3, 4), [2, 3, 4]), ("100", (1, 2), [4, 8])]
)
def test_a_run_ends_when_saving_goes_wrong_again_and_again_or_at_its_end(
    every, chosen, failed, tiny: Path, photos: Path, tmp_path: Path, bad_saves, capsys
) -> None:
    bad_saves(*chosen)
    run = tmp_path / "run"
    assert main(command(tiny, photos, run, "--checkpoint.every-steps", every)) == 2
    error = capsys.readouterr().err
    assert f"step_{failed[-1]:08d}.pth could not be written: Stale" in error
    assert "--resume" in error and [r["step"] for r in records(run, "not_saved")] == failed


def bad_moments(rank: int) -> None:
    """The last process cannot write its part of the first checkpoint."""
    calls, real = 0, dcp.FileSystemWriter.write_data

    def write_data(self, *args):
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 1:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return real(self, *args)

    dcp.FileSystemWriter.write_data = write_data


def test_all_processes_go_on_after_a_save_that_failed_in_one(resumable, tmp_path: Path) -> None:
    with Crew(resumable("run", 2), 2, tmp_path, setup=bad_moments) as crew:
        assert crew.wait() == [0, 0], crew.text() + crew.text(1)
    assert "Disk quota exceeded; older ones are intact. The run continues" in crew.text()
    assert [r["step"] for r in records(tmp_path / "run", "checkpoint")] == [4]


def test_a_log_that_stays_broken_does_not_end_a_run(
    tiny: Path, photos: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    real = LogFile.write_waiting
    monkeypatch.setattr(
        LogFile,
        "write_waiting",
        lambda log: real(log) if len(log.waiting) == 1 and log._end < 2500 else "Disk full",
    )
    run = tmp_path / "run"
    assert main(command(tiny, photos, run)) == 0
    text = capsys.readouterr().out
    assert text.count("log.jsonl could not be written: Disk full; its lines wait in memory") == 1
    written = len(read_log(run / "log.jsonl"))
    assert f"{12 - written} lines could not be written to {run / 'log.jsonl'}" in text
    assert RunFolder(run).newest_checkpoint().name == "step_00000008.pth"


def test_a_log_is_cut_beside_and_on_the_disk_before_it_is_replaced(
    tmp_path: Path, monkeypatch
) -> None:
    log, done = tmp_path / "log.jsonl", []
    lines = [json.dumps({"event": "train", "step": step}) + "\n" for step in (1, 2, 3)]
    log.write_text("".join(lines) + '{"event": "tr')
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, r=real: done.append(n) or r(*a))
    assert [r["step"] for r in cut_log(log, 2)] == [1, 2]
    assert log.read_text() == "".join(lines[:2])
    assert done[:2] == ["fsync", "replace"]
    assert (tmp_path / "log.1.jsonl").read_text() == "".join(lines) + '{"event": "tr'
    assert len(cut_log(log, 2)) == 2 and not (tmp_path / "log.2.jsonl").exists()  # nothing to cut
    assert len(cut_log(log, 1)) == 1 and (tmp_path / "log.2.jsonl").exists()


def test_room_for_the_checkpoints_that_are_there_at_once(tmp_path: Path, monkeypatch) -> None:
    folder, every, one = RunFolder(tmp_path), None, 1_201_200

    def check(free: float) -> None:
        usage = shutil.disk_usage(tmp_path)._replace(free=free * one)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        folder.check_room(CheckpointConfig(keep_last=2, keep_every_epochs=every), one)

    check(3.0)
    with pytest.raises(UserError, match="needs room for 3"):
        check(2.9)
    # Those of before make room for later ones.
    for step, needed in ((1, 2), (2, 1), (3, 1)):
        save(folder, step, CheckpointConfig(keep_last=9))
        check(needed)
        with pytest.raises(UserError, match=f"needs room for {needed} "):
            check(needed - 0.1)
    every = 1  # the last of them stays for good, being the end of an epoch
    check(1.0)
    with pytest.raises(UserError, match="needs room for 1 "):
        check(0.9)
    save(folder, 6, CheckpointConfig(keep_last=9))
    assert num_removable(RunFolder(tmp_path), CheckpointConfig(keep_every_epochs=1)) == 2


# ---- trackers -----------------------------------------------------------------------------------


def no_login(rank: int) -> None:
    """A wandb that is here but does not know the user."""
    fake = types.ModuleType("wandb")
    fake.__spec__ = types.SimpleNamespace()

    def init(**_: object) -> None:
        raise RuntimeError("api_key not configured")

    fake.init = init
    sys.modules["wandb"] = fake


def test_a_tracker_that_refuses_ends_all_processes_before_the_folder_is_a_run(
    resumable, tmp_path: Path
) -> None:
    argv = [a for a in resumable("run", 2, "--log.wandb", "mim") if a != "--resume"]
    with Crew(argv, 2, tmp_path, setup=no_login) as crew:
        assert crew.wait() == [2, 2], crew.text() + crew.text(1)
    assert "api_key not configured; log in (wandb login)" in crew.text()
    assert "error" not in crew.text(1)
    assert find_checkpoint(RunFolder(tmp_path / "run"), None) == Found()  # it can be repeated
