"""One command at a time in a run's folder, whatever happened to the one before."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from crew import Crew, command, context, losses, wait_for

from greenmim.cli import main
from greenmim.guards import UserError
from greenmim.launch import World
from greenmim.processes import Processes
from greenmim.recipe import CheckpointConfig
from greenmim.training import folder_lock, run_folder
from greenmim.training.run_folder import RunFolder

ALONE = Processes(World(), torch.device("cpu"))


def content(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def hold_for_ever(folder: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with RunFolder(folder).lock.held(ALONE):
        time.sleep(600)


@pytest.fixture
def holder(tmp_path: Path):
    """A process of job 42 that holds a folder."""
    arguments = (str(tmp_path / "run"), {"SLURM_JOB_ID": "42"})
    process = context.Process(target=hold_for_ever, args=arguments)
    process.start()
    wait_for((tmp_path / "run" / "in_use.json").exists)
    yield process
    process.kill()
    process.join()


def test_a_killed_holder_is_replaced_at_once(holder, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    told = rf"in use by process {holder.pid} on \S+ \(Slurm job 42\)"
    with pytest.raises(UserError, match=told):
        folder.lock.check_free()
    with pytest.raises(UserError, match=told), folder.lock.held(ALONE):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    folder.lock.check_free()
    with folder.lock.held(ALONE):
        assert json.loads(folder.lock.holder.read_text())["process"] == os.getpid()
    assert not folder.lock.holder.exists()


@pytest.mark.parametrize(("job", "restarts", "taken"), [("42", "1", True), ("43", "1", False)])
def test_a_job_that_was_requeued_takes_its_own_folder(
    job: str, restarts: str, taken: bool, holder, tmp_path: Path, monkeypatch
) -> None:
    """From a node that is down, of which a file server does not know yet."""
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    folder = RunFolder(tmp_path / "run")
    if taken:
        folder.lock.check_free()
        with folder.lock.held(ALONE), pytest.raises(UserError, match="in use by"):
            RunFolder(tmp_path / "run").lock.check_free()
    else:
        with pytest.raises(UserError, match="in use by"), folder.lock.held(ALONE):
            pass


def test_two_commands_at_once(
    finished_run: Path, tiny: Path, photos: Path, tmp_path: Path, capsys
) -> None:
    """Of those that start together on a new folder one goes on, and later ones are refused."""
    run, got, refused, end = tmp_path / "run", [], [], threading.Event()

    def hold() -> None:
        try:
            with RunFolder(run).lock.held(ALONE):
                got.append(1)
                end.wait(60)
        except UserError:
            refused.append(1)

    threads = [threading.Thread(target=hold) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(refused) == 7)
    before = content(run)
    for more in ((), ("--resume",)):
        assert main(command(tiny, photos, run, *more)) == 2
        text = capsys.readouterr().err
        assert f"in use by process {os.getpid()} on" in text and "choose another folder" in text
    assert content(run) == before and len(got) == 1
    end.set()
    for thread in threads:
        thread.join()
    assert main(command(tiny, photos, run, "--epochs", "1")) == 0
    assert not (run / "in_use.json").exists()


def test_the_folder_is_held_while_a_run_goes_on(tiny: Path, photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Crew(command(tiny, photos, run, "--epochs", "5000"), 1, tmp_path) as crew:
        wait_for(lambda: (run / "log.jsonl").exists() and bool(losses(run)))
        shown = json.loads((run / "in_use.json").read_text())
        assert shown["process"] == crew.processes[0].pid
        assert main(command(tiny, photos, run, "--resume")) == 2
        crew.processes[0].terminate()
        assert crew.wait() == [75], crew.text()
    assert not (run / "in_use.json").exists()


def test_a_folder_that_was_given_away_is_left_alone(tmp_path: Path) -> None:
    """To the requeued job, say, by a file server that took this process for dead."""
    folder, model = RunFolder(tmp_path), torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    with folder.lock.held(ALONE):
        folder.checkpoints.mkdir()
        other = {"process": 11, "host": "gpu7", "job": None, "restarts": "0", "token": "0123"}
        folder.lock.holder.write_text(json.dumps(other))
        before = content(tmp_path)
        state = {"updates": 1, "step": 1, "steps_per_epoch": 3}
        with pytest.raises(UserError, match="taken over by process 11 on gpu7"):
            run_folder.save(folder, state, model, optimizer, CheckpointConfig(), ALONE)
    assert content(tmp_path) == before


def apart(rank: int) -> None:
    """Every process in a folder of its own, as on machines that share nothing."""
    here = Path(os.environ["APART"]) / str(rank)
    here.mkdir()
    os.chdir(here)
    folder_lock.HIDDEN_SECONDS = 0.5


def test_machines_that_do_not_share_the_work_dir(resumable, tmp_path: Path) -> None:
    argv = ["run" if a == str(tmp_path / "run") else a for a in resumable("run", 2)]
    options = {"setup": apart, "environment": {"APART": str(tmp_path)}}
    with Crew(argv, 2, tmp_path, **options) as crew:
        assert crew.wait() == [2, 2], crew.text() + crew.text(1)
    assert "Process 1: --work-dir run on" in crew.text() and "that all machines" in crew.text()
    assert [p.name for p in (tmp_path / "0" / "run").iterdir()] == [".lock"]
