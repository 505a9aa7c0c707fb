"""Processes that hang or cannot start; a save that meets a death."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from crew import Crew, wait_for

from greenmim import processes
from greenmim.data import dataset
from greenmim.training import run_folder
from greenmim.training.run_folder import RunFolder, read_run_checkpoint

pytestmark = pytest.mark.slow


def stuck_loading(rank: int) -> None:
    """Process VICTIM waits for ever for an image, as on a disk that is gone."""
    calls, real = 0, dataset.read_crop

    def read_crop_of_a_dead_disk(*arguments):
        nonlocal calls
        calls += 1
        if calls > 20 and rank == int(os.environ["VICTIM"]):
            threading.Event().wait()
        return real(*arguments)

    dataset.read_crop = read_crop_of_a_dead_disk


def test_a_process_that_hangs_is_not_waited_for_for_ever(resumable, tmp_path: Path) -> None:
    argv = resumable("run", 2, "--epochs", "50", "--hang-minutes", "0.1")
    options = {"setup": stuck_loading, "environment": {"VICTIM": "1"}}
    with Crew(argv, 2, tmp_path, **options) as crew:
        crew.processes[0].join(90)
        assert crew.processes[0].exitcode == 4, crew.text() + crew.text(1)
    (line,) = [x for x in crew.text().splitlines() if x.startswith("greenmim: error")]
    assert "Process 0 waited in vain for another one, which died or hangs" in line


def slow_commit(rank: int) -> None:
    """The main process takes long to write the file; the other dies."""
    real = run_folder.save_atomic

    def save_atomic(state, path):
        if state["step"] == 4:
            Path(os.environ["HERE"], "writing").touch()
            time.sleep(3)
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
    assert "waited in vain" in crew.text() and not list(newest.parent.glob(".*"))


# ---- how they meet ------------------------------------------------------------------------------


def no_device(rank: int) -> None:
    """One process finds no GPU, another one computes on something else: VICTIM and HOW."""
    from greenmim.guards import UserError
    from greenmim.training import train

    real = train.choose_device

    def choose_device(recipe, world):
        if rank != int(os.environ["VICTIM"]):
            return real(recipe, world)
        if os.environ["HOW"] == "error":
            raise UserError("PyTorch sees no CUDA GPU here")
        if os.environ["HOW"] == "late":
            time.sleep(60)
        return torch.device("cpu")

    train.choose_device = choose_device


@pytest.mark.parametrize(
    ("victim", "how", "wanted"),
    [
        (1, "error", "Process 1 on .*: PyTorch sees no CUDA GPU here"),
        (0, "error", "error: PyTorch sees no CUDA GPU here"),
        (1, "late", "Process 0 of 2 cannot meet the others: .*1/2 clients joined"),
    ],
)
def test_a_process_that_cannot_start_is_told_at_once(
    victim: int, how: str, wanted: str, resumable, tmp_path: Path
) -> None:
    options = {"setup": no_device, "environment": {"VICTIM": str(victim), "HOW": how}}
    argv = resumable("run", 2, "--hang-minutes", "0.1")
    with Crew(argv, 2, tmp_path, **options) as crew:
        for process in crew.processes[: 1 if how == "late" else 2]:
            process.join(60)
            assert process.exitcode == 2, crew.text() + crew.text(1)
    (line,) = crew.text().splitlines()
    assert re.search(wanted, line), line
    assert crew.text(1) == "" and not (tmp_path / "run").exists()


def test_processes_that_do_not_go_together() -> None:
    alike = [(None, "cuda", "a"), (None, "cuda", "b")]
    assert processes._why_not(alike) is None
    text = processes._why_not([alike[0], (None, "cpu", "b")])
    assert "the same device: cuda in process 0 on a and cpu in process 1 on b; --device" in text
