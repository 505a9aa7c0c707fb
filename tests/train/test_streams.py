"""What becomes of a run whose output nobody takes, whose memory ends, whose names are no text."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from crew import command, losses, records
from test_launch import environment

from greenmim.cli import main
from greenmim.training.train import Trainer, told_of_memory

GREENMIM = [sys.executable, "-m", "greenmim"]


@pytest.mark.parametrize("output", ["head", "full"])
def test_output_that_goes_away_loses_no_work(
    output: str, tiny: Path, photos: Path, tmp_path: Path
) -> None:
    argv = [*GREENMIM, *command(tiny, photos, tmp_path / "run")]
    if output == "head":
        first = subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE)
        first.stdout.readline()
        first.stdout.close()
        assert first.wait(60) == 0
    else:
        with open("/dev/full", "w") as full:
            assert subprocess.run(argv, env=environment(), stdout=full, timeout=60).returncode == 0
    assert losses(tmp_path / "run").keys() == set(range(1, 9))
    assert len(records(tmp_path / "run", "output_lost")) == 1


def test_help_into_a_pipe_that_closes() -> None:
    with subprocess.Popen(
        [*GREENMIM, "pretrain", "--help"],
        env=environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(60) == 0


def test_names_that_are_no_text(tiny: Path, photos: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    (data / os.fsdecode(b"caf\xe9.png")).write_bytes(b"no picture")
    done = subprocess.run(
        [*GREENMIM, *command(tiny, data, tmp_path / "run")],
        env=environment(PYTHONIOENCODING="utf-8:strict"),
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert rb"caf\udce9.png" in done.stdout
    (record,) = records(tmp_path / "run", "unreadable_image")
    assert record["path"].endswith("caf\udce9.png")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_memory_that_runs_out(
    error: Exception, tiny: Path, photos: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Told in a sentence; and the command can be repeated, for nothing was saved yet."""
    real, calls = Trainer.update, []

    def update(self, step: int) -> bool:
        calls.append(step)
        if len(calls) == 4:
            raise error
        return real(self, step)

    monkeypatch.setattr(Trainer, "update", update)
    argv = command(tiny, photos, tmp_path / "run")
    assert main(argv) == 2
    text = capsys.readouterr().err
    assert (
        "The memory of cpu ran out" in text and "--data.batch-size" in text and "more" not in text
    )
    assert main(argv) == 0
    assert losses(tmp_path / "run").keys() == set(range(1, 9))
    assert (tmp_path / "run" / "log.1.jsonl").exists()
    capsys.readouterr()
    assert main(argv) == 2 and "already holds a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind", [dist.DistBackendError, torch.AcceleratorError, NotImplementedError]
)
def test_other_errors_are_not_taken_for_want_of_memory(kind) -> None:
    with pytest.raises(kind), told_of_memory(torch.device("cpu"), "lower it"):
        raise kind("NCCL communicator was aborted")


def test_an_error_on_a_full_disk_keeps_its_code(tiny: Path, photos: Path, tmp_path: Path) -> None:
    argv = [*GREENMIM, *command(tiny, photos, tmp_path / "run", "--data.batch-size", "50")]
    with open("/dev/full", "w") as full:
        assert subprocess.run(argv, env=environment(), stderr=full, timeout=60).returncode == 2


@pytest.mark.parametrize("wrong", [("--no-such-option", "1"), ("--epochs", "0")])
def test_wrong_options_are_told_by_one_process(
    wrong: tuple[str, str], tiny: Path, photos: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main(command(tiny, photos, tmp_path / "run", *wrong)) == 2
    assert capsys.readouterr().err.count("greenmim: error") == 1
