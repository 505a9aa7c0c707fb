"""One command at a time in a run's folder, whatever happened to the one before."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from crew import Crew, command, context, losses, wait_for
from torch.distributed.checkpoint import FileSystemWriter

from greenmim.cli import main
from greenmim.recipe import CheckpointConfig, UserError
from greenmim.training.distributed import Processes
from greenmim.training.lease import NAME, Holder, Lease, _here, _state_and_birth
from greenmim.training.run_folder import RunFolder
from greenmim.training.world import World


def content(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def shown(folder: Path) -> Holder:
    return Holder(**json.loads((folder / NAME).read_text()))


def left_by(folder: Path, **other: object) -> Holder:
    """The file of another holder."""
    holder = dataclasses.replace(_here("0123"), **other)
    folder.mkdir(exist_ok=True)
    (folder / NAME).write_text(json.dumps(dataclasses.asdict(holder)))
    return holder


def hold_for_ever(folder: str) -> None:
    Lease(Path(folder)).acquire()
    time.sleep(600)


@pytest.fixture
def killed_holder(tmp_path: Path):
    """A folder whose holder was killed."""
    process = context.Process(target=hold_for_ever, args=(str(tmp_path / "run"),))
    process.start()
    wait_for((tmp_path / "run" / NAME).exists)
    wait_for(lambda: (tmp_path / "run" / NAME).read_text() != "")
    with pytest.raises(UserError, match=f"in use by process {process.pid} on"):
        Lease(tmp_path / "run").acquire()
    os.kill(process.pid, signal.SIGKILL)
    yield tmp_path / "run"
    process.join()


def test_a_killed_holder_on_this_machine_is_replaced_at_once(killed_holder: Path) -> None:
    wait_for(lambda: shown(killed_holder).is_gone())
    lease = Lease(killed_holder)
    lease.stale_seconds = 1e6
    token = lease.acquire()
    assert shown(killed_holder).token == token and shown(killed_holder).pid == os.getpid()
    lease.release()
    assert not list(killed_holder.iterdir())


def test_a_killed_holder_that_nobody_waited_for_is_replaced_at_once(tmp_path: Path) -> None:
    """As in a container, whose first process may not do that."""
    with subprocess.Popen(["sleep", "600"]) as process:
        _, born = _state_and_birth(process.pid)
        left_by(tmp_path, pid=process.pid, born=born)
        with pytest.raises(UserError, match=f"in use by process {process.pid} on"):
            Lease(tmp_path).acquire()
        process.kill()
        wait_for(lambda: shown(tmp_path).is_gone())
        lease = Lease(tmp_path)
        lease.acquire()
        lease.release()


def test_a_later_process_with_the_same_number_is_another(tmp_path: Path) -> None:
    left_by(tmp_path, born="1")
    lease = Lease(tmp_path)
    lease.stale_seconds = 1e6
    assert lease.acquire() == shown(tmp_path).token
    lease.release()


def test_two_commands_at_once(
    finished_run: Path, tiny: Path, photos: Path, tmp_path: Path, capsys
) -> None:
    """Of those that start together on a new folder one goes on, and later ones are refused."""
    run, got = tmp_path / "run", []

    def acquire() -> None:
        lease = Lease(run)
        try:
            lease.acquire()
            got.append(lease)
        except UserError:
            pass

    threads = [threading.Thread(target=acquire) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    before = content(run)
    for more in ((), ("--resume",)):
        assert main(command(tiny, photos, run, *more)) == 2
        text = capsys.readouterr().err
        assert f"in use by process {os.getpid()} on" in text and "choose another folder" in text
    assert content(run) == before
    got[0].release()
    assert main(command(tiny, photos, run, "--epochs", "1")) == 0
    assert not (run / NAME).exists()


def test_the_folder_is_held_while_a_run_goes_on(tiny: Path, photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Crew(command(tiny, photos, run, "--epochs", "5000"), 1, tmp_path) as crew:
        wait_for(lambda: (run / "log.jsonl").exists() and bool(losses(run)))
        assert shown(run).pid == crew.processes[0].pid
        assert main(command(tiny, photos, run, "--resume")) == 2
        crew.processes[0].terminate()
        assert crew.wait() == [75], crew.text()
    assert not (run / NAME).exists()


def test_a_holder_elsewhere_that_gives_a_sign_of_life(tmp_path: Path, capsys) -> None:
    left_by(tmp_path, place="other", host="gpu7", pid=11, job="42")
    lease, done = Lease(tmp_path), threading.Event()

    def live() -> None:
        while not done.wait(0.05):
            os.utime(tmp_path / NAME)

    other = threading.Thread(target=live)
    other.start()
    try:
        with pytest.raises(UserError, match=r"in use by process 11 on gpu7 \(Slurm job 42\)"):
            lease.acquire()
    finally:
        done.set()
        other.join()
    assert "waiting up to 90 s for a sign of life" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == [NAME] and shown(tmp_path).pid == 11


def test_a_holder_elsewhere_that_is_silent(tmp_path: Path, capsys) -> None:
    left_by(tmp_path, place="other", host="gpu7", pid=11)
    lease = Lease(tmp_path)
    lease.stale_seconds = 0.5
    lease.acquire()
    assert "held by process 11 on gpu7, last heard of" in capsys.readouterr().out
    assert shown(tmp_path).pid == os.getpid()
    lease.release()
    # One that was silent for long is not waited for.
    left_by(tmp_path, place="other", host="gpu7", pid=11)
    os.utime(tmp_path / NAME, (time.time() - 1000,) * 2)
    lease = Lease(tmp_path)
    lease.acquire()
    assert capsys.readouterr().out == ""
    lease.release()


def test_the_file_is_touched_while_it_is_held(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("greenmim.training.lease.BEAT_SECONDS", 0.01)
    lease = Lease(tmp_path)
    lease.acquire()
    os.utime(tmp_path / NAME, (0, 0))
    wait_for(lambda: (tmp_path / NAME).stat().st_mtime > 0)
    other = left_by(tmp_path, place="other")
    os.utime(tmp_path / NAME, (0, 0))
    time.sleep(0.2)
    assert (tmp_path / NAME).stat().st_mtime == 0  # another's is left alone
    lease.release()
    assert shown(tmp_path) == other


@pytest.mark.parametrize(("job", "restarts", "taken"), [("42", "1", True), ("43", "1", False)])
def test_a_job_that_was_requeued_takes_its_own_folder(
    job: str, restarts: str, taken: bool, tmp_path: Path, monkeypatch, capsys
) -> None:
    left_by(tmp_path, place="other", job="42")
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    lease = Lease(tmp_path)
    if taken:
        lease.stale_seconds = 2.0
        lease.acquire()
        assert capsys.readouterr().out == ""  # did not wait
        assert shown(tmp_path).restarts == 1
        lease.release()
    else:
        sign = threading.Timer(0.3, os.utime, (tmp_path / NAME,))
        sign.start()
        with pytest.raises(UserError, match="in use by process"):
            lease.acquire()
        sign.join()


def test_a_process_that_lost_the_folder_saves_nothing(tmp_path: Path) -> None:
    """It was suspended for long, and another machine took the folder over."""
    folder, alone = RunFolder(tmp_path), Processes(World(), torch.device("cpu"))
    with folder.held(alone):
        folder.checkpoints.mkdir()
        left_by(tmp_path, place="other", host="gpu7", pid=11)
        before = content(tmp_path)
        state = {"updates": 1, "step": 1, "steps_per_epoch": 3}
        with pytest.raises(UserError, match="taken over by process 11 on gpu7"):
            folder.save(state, CheckpointConfig(), lambda path: path.mkdir(), alone)
        assert content(tmp_path) == before

        # Nor if it lost it while it wrote the moments, whether that went well or not.
        def write(path: Path, whole: bool) -> None:
            left_by(tmp_path, place="other", host="gpu7")
            path.mkdir(exist_ok=True)
            if whole:
                writer = FileSystemWriter(path)
                dcp.save({"moment": torch.zeros(2)}, storage_writer=writer, no_dist=True)

        for whole in (False, True):
            (tmp_path / NAME).unlink()
            with pytest.raises(UserError, match="taken over by process"):
                folder.save(state, CheckpointConfig(), partial(write, whole=whole), alone)
            assert (folder.checkpoints / "step_00000001.optimizer").is_dir()
    assert not folder.by_step()


def apart(rank: int) -> None:
    """Every process in a folder of its own, as on machines that share nothing."""
    here = Path(os.environ["APART"]) / str(rank)
    here.mkdir()
    os.chdir(here)
    Lease.hidden_seconds = 0.5


def test_machines_that_do_not_share_the_work_dir(resumable, tmp_path: Path) -> None:
    argv = ["run" if a == str(tmp_path / "run") else a for a in resumable("run", 2)]
    options = {"setup": apart, "environment": {"APART": str(tmp_path)}}
    with Crew(argv, 2, tmp_path, **options) as crew:
        assert crew.wait() == [2, 2], crew.text() + crew.text(1)
    assert "Process 1: --work-dir run on" in crew.text() and "that all machines" in crew.text()
    assert not list((tmp_path / "0" / "run").iterdir())
