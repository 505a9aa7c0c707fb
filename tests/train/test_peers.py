"""When one process of a run dies, hangs or raises an error, the others end and name it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from crew import Crew, losses, wait_for

from greenmim.training.run_folder import RunFolder, read_run_checkpoint

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("size", "victim", "how"),
    [
        (2, 1, signal.SIGKILL),
        (3, 0, signal.SIGKILL),
        (2, 1, signal.SIGSTOP),  # its machine hangs: no connection is closed
        (2, 0, signal.SIGSTOP),
    ],
    ids=["killed", "main-killed", "hangs", "main-hangs"],
)
def test_when_one_process_dies_or_hangs_the_others_end(
    size: int, victim: int, how: signal.Signals, resumable, tmp_path: Path
) -> None:
    """Without a launcher that ends them: by the collectives' own errors."""
    run = tmp_path / "run"
    options = ("--epochs", "5000", "--data.batch-size", "1", "--hang-minutes", "0.1")
    with Crew(resumable("run", size, *options), size, tmp_path) as crew:
        wait_for(lambda: (run / "log.jsonl").exists() and len(losses(run)) > 2)
        os.kill(crew.processes[victim].pid, how)
        started = time.monotonic()
        rest = [rank for rank in range(size) if rank != victim]
        for rank in rest:
            crew.processes[rank].join(60)
        assert time.monotonic() - started < 60
        assert [crew.processes[rank].exitcode for rank in rest] == [4] * len(rest)
    for rank in rest:
        lines = [x for x in crew.text(rank).splitlines() if x.startswith("greenmim: error")]
        assert len(lines) == 1 and f"Process {rank} waited in vain" in lines[0], crew.text(rank)
    assert read_run_checkpoint(RunFolder(run).newest_checkpoint())


def no_images(rank: int) -> None:
    """From some image on, one process can read nothing."""
    if rank != int(os.environ["VICTIM"]):
        return
    from greenmim.data import dataset

    calls, real = 0, dataset.read_crop

    def read_crop(*arguments):
        nonlocal calls
        calls += 1
        if calls > 20:
            raise OSError("Stale file handle")
        return real(*arguments)

    dataset.read_crop = read_crop


@pytest.mark.parametrize("victim", [0, 1])
def test_the_error_of_one_process_ends_the_other(victim: int, resumable, tmp_path: Path) -> None:
    options = {"setup": no_images, "environment": {"VICTIM": str(victim)}}
    with Crew(resumable("run", 2, "--epochs", "50"), 2, tmp_path, **options) as crew:
        codes = crew.wait(60)
    own, other = crew.text(victim), crew.text(1 - victim)
    assert (codes[victim], codes[1 - victim]) == (2, 4), own + other
    assert "No image can be read" in own and "Stale file handle" in own
    assert f"Process {1 - victim} waited in vain for another one" in other


def test_bad_input_is_told_once(resumable, tmp_path: Path) -> None:
    with Crew(resumable("run", 2, "--data.batch-size", "50"), 2, tmp_path) as crew:
        assert crew.wait(60) == [2, 2], crew.text() + crew.text(1)
    assert crew.text().count("greenmim: error") == 1 and "fewer than the" in crew.text()
    assert crew.text(1) == "" and not (tmp_path / "run").exists()
