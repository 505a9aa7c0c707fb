"""Processes that hang or are suspended; saves and pictures that fail or meet a death."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from crew import Crew, losses, wait_for

from greenmim.data import dataset
from greenmim.training import meeting, run_folder
from greenmim.training.peers import AwakeClock, PeerWatch
from greenmim.training.run_folder import RunFolder, read_run_checkpoint


def impatient(rank: int) -> None:
    """A silence of 3 s in place of 20 is a death, so that the tests are short."""
    PeerWatch.silent_seconds, PeerWatch.grace_seconds = 3.0, 1.0


def stuck_loading(rank: int) -> None:
    """Process VICTIM waits for ever for an image, as on a disk that is gone."""
    impatient(rank)
    calls, real = 0, dataset.read_crop

    def read_crop_of_a_dead_disk(*arguments):
        nonlocal calls
        calls += 1
        if calls > 20 and rank == int(os.environ["VICTIM"]):
            threading.Event().wait()
        return real(*arguments)

    dataset.read_crop = read_crop_of_a_dead_disk


def test_a_process_that_hangs_is_named_with_its_place_and_stack(resumable, tmp_path: Path) -> None:
    victim = 1
    argv = resumable("run", 2, "--epochs", "50", "--hang-minutes", "0.1")
    options = {"setup": stuck_loading, "environment": {"VICTIM": str(victim)}}
    with Crew(argv, 2, tmp_path, **options) as crew:
        assert crew.wait(90) == [4, 4], crew.text() + crew.text(1)
    for rank in (0, 1):
        lines = [x for x in crew.text(rank).splitlines() if x.startswith("greenmim: error")]
        assert len(lines) == 1 and f"process {victim} on " in lines[0], crew.text(rank)
        assert "hangs while the others wait" in lines[0] and ", loading) for 0.1 min" in lines[0]
        assert ("read_crop_of_a_dead_disk" in crew.text(rank)) == (rank == victim)


def test_a_job_that_is_suspended_goes_on(resumable, tmp_path: Path) -> None:
    run = tmp_path / "run"
    argv = resumable("run", 2, "--epochs", "15", "--hang-minutes", "0.05")
    with Crew(argv, 2, tmp_path, setup=impatient) as crew:
        wait_for(lambda: len(losses(run)) > 2)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in crew.processes:
                os.kill(process.pid, number)
            if number == signal.SIGSTOP:
                done = len(losses(run))
                assert done < 30
                time.sleep(5)  # longer than the patience
        assert crew.wait(90) == [0, 0], crew.text() + crew.text(1)
    assert len(losses(run)) == 30


def test_time_in_which_the_process_was_stopped_does_not_count(monkeypatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = AwakeClock(2.0)
    now += 1.0
    assert clock.read() == 1.0
    now += 3600.0
    assert clock.read() == 3.0


def test_the_first_cause_stays() -> None:
    watch = PeerWatch(None, 0, 2)
    watch._find("process 1 is gone")
    watch._find(None)
    watch._find("process 0 does not answer")
    assert watch.cause == "process 1 is gone"


def slow_commit(rank: int) -> None:
    """The main process takes longer to write the file than anybody's patience; the other dies."""
    impatient(rank)
    real = run_folder.save_atomic

    def save_atomic(state, path):
        if state["step"] == 4:
            Path(os.environ["HERE"], "writing").touch()
            time.sleep(7)
        real(state, path)

    run_folder.save_atomic = save_atomic


def test_a_save_that_the_main_process_can_finish_alone_is_finished(
    resumable, tmp_path: Path
) -> None:
    options = {"setup": slow_commit, "environment": {"HERE": str(tmp_path)}}
    with Crew(resumable("run", 2, "--epochs", "9"), 2, tmp_path, **options) as crew:
        wait_for((tmp_path / "writing").exists)
        os.kill(crew.processes[1].pid, signal.SIGKILL)
        crew.processes[0].join(60)
        assert crew.processes[0].exitcode == 4, crew.text()
    newest = RunFolder(tmp_path / "run").newest_checkpoint()
    assert read_run_checkpoint(newest)["step"] == 4
    assert "process 1" in crew.text() and not list(newest.parent.glob(".*"))


# ---- how they meet ------------------------------------------------------------------------------


def no_device(rank: int) -> None:
    """One process finds no GPU, another one computes on something else: VICTIM and HOW."""
    from greenmim.recipe import UserError
    from greenmim.training import train

    real = train.choose_device

    def choose_device(recipe, world):
        if rank != int(os.environ["VICTIM"]):
            return real(recipe, world)
        if os.environ["HOW"] == "error":
            raise UserError("PyTorch sees no CUDA GPU here")
        if os.environ["HOW"] == "late":
            time.sleep(60)
        return torch.device("meta")

    train.choose_device = choose_device
    meeting.START_SECONDS, meeting.SHORT_SECONDS = 4.0, 1.0


@pytest.mark.parametrize(
    ("victim", "how", "wanted"),
    [
        (1, "error", "Process 1 on .*: PyTorch sees no CUDA GPU here"),
        (0, "error", "error: PyTorch sees no CUDA GPU here"),
        (1, "other", "do not have the same device: cpu in process 0 .* and meta in process 1 on"),
        (1, "late", "Process 1 of 2 did not come"),
    ],
)
def test_a_process_that_cannot_start_is_told_at_once(
    victim: int, how: str, wanted: str, resumable, tmp_path: Path
) -> None:
    options = {"setup": no_device, "environment": {"VICTIM": str(victim), "HOW": how}}
    with Crew(resumable("run", 2), 2, tmp_path, **options) as crew:
        for process in crew.processes[: 1 if how == "late" else 2]:
            process.join(60)
            assert process.exitcode == 2, crew.text() + crew.text(1)
    (line,) = crew.text().splitlines()
    assert re.search(wanted, line), line
    assert crew.text(1) == "" and not (tmp_path / "run").exists()


def test_once_one_cannot_start_the_rest_is_not_waited_for_long(monkeypatch) -> None:
    monkeypatch.setattr(meeting, "START_SECONDS", 40.0)
    monkeypatch.setattr(meeting, "SHORT_SECONDS", 0.2)
    store, error = dist.HashStore(), {"host": "a", "error": "no GPU"}
    store.set("here/0", json.dumps(error))
    started = time.monotonic()
    found = meeting._gather(store, 2)
    assert found == [error, None] and time.monotonic() - started < 20
