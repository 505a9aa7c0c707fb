"""How a run that is asked to stop ends: one save, and nothing left behind."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from crew import Crew, command, free_port, losses, records, wait_for
from test_launch import environment

from greenmim.cli import main
from greenmim.data import dataset
from greenmim.guards import StopSignal, exit_code_of
from greenmim.mim import GreenMIM
from greenmim.training import run_folder
from greenmim.training import startup as run_module
from greenmim.training.run_folder import RunFolder, read_run_checkpoint

pytestmark = pytest.mark.slow

# ---- signals ------------------------------------------------------------------------------------


def signalled_in_a_save(rank: int) -> None:
    """The main process is asked to stop while it writes its first checkpoint."""
    real = run_folder.save_atomic

    def save_atomic(state, path):
        os.kill(os.getpid(), signal.SIGTERM)
        real(state, path)

    run_folder.save_atomic = save_atomic


@pytest.mark.parametrize("size", [1, 2])
def test_a_signal_in_a_save_costs_no_other_save(size: int, resumable, tmp_path: Path) -> None:
    argv = resumable("run", size, "--epochs", "9")
    with Crew(argv, size, tmp_path, setup=signalled_in_a_save) as crew:
        assert crew.wait(60) == [75] * size, crew.text()
    run = tmp_path / "run"
    assert [r["step"] for r in records(run, "checkpoint")] == [2]
    (stopped,) = records(run, "stopped")
    assert stopped["step"] == 2 and max(losses(run)) == 2


def test_the_first_signal_stays_and_nohup_is_respected() -> None:
    with StopSignal() as stop:
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.received == signal.SIGUSR2  # Slurm's warning: submitit queues the job again
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    # However these tests were started, which may be by nohup themselves.
    for handler, received in ((signal.SIG_DFL, signal.SIGHUP), (signal.SIG_IGN, None)):
        before = signal.signal(signal.SIGHUP, handler)
        try:
            with StopSignal() as stop:
                os.kill(os.getpid(), signal.SIGHUP)
                assert stop.received == received
        finally:
            signal.signal(signal.SIGHUP, before)
    assert exit_code_of(signal.SIGHUP) == 75


STARTER = """
import os, pathlib
from greenmim.__main__ import script

attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
name = f"pid_{attempt}_{os.environ['RANK']}"
pathlib.Path(__file__).with_name(name).write_text(str(os.getpid()))
script()
"""


def test_torchrun_restarts_what_was_killed_and_it_goes_on(
    tiny: Path, photos: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (tmp_path / "start.py").write_text(STARTER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--max-restarts", "2", "--master-port", str(free_port())]
    argv = command(tiny, photos, run, "--epochs", "40", "--checkpoint.every-steps", "5", "--resume")
    with subprocess.Popen(
        [*torchrun, str(tmp_path / "start.py"), *argv],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            for attempt, victim in enumerate((1, 0)):
                done = len(records(run, "checkpoint"))
                wait_for(lambda n=done: len(records(run, "checkpoint")) > n)
                os.kill(int((tmp_path / f"pid_{attempt}_{victim}").read_text()), signal.SIGKILL)
                wait_for((tmp_path / f"pid_{attempt + 1}_0").exists)
            text = process.communicate(timeout=90)[0]
        finally:
            process.terminate()
    assert process.returncode == 0, text
    starts = [r["step"] for r in records(run, "start")]
    assert len(starts) == 3 and starts[0] == 0 < starts[1] <= starts[2], text
    assert losses(run).keys() == set(range(1, 81)), text


def test_torchrun_names_the_cause(tiny: Path, photos: Path, tmp_path: Path) -> None:
    """Of an error that only one process has: recorded for its table, once."""
    (tmp_path / "start.py").write_text(
        """
import os
from greenmim.__main__ import script
from greenmim.training.train import Trainer

def update(self, step):
    raise ArithmeticError("of one process")

if os.environ["RANK"] == "1":
    Trainer.update = update
script()
"""
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--master-port", str(free_port()), str(tmp_path / "start.py")]
    argv = command(tiny, photos, tmp_path / "run", "--epochs", "40")
    done = subprocess.run(
        [*torchrun, *argv], env=environment(), capture_output=True, text=True, timeout=90
    )
    cause = done.stderr[done.stderr.index("Root Cause") :]
    assert done.returncode == 1 and re.search(r"rank +: 1 ", cause), done.stderr
    assert "ArithmeticError: of one process" in cause


# ---- loader processes ---------------------------------------------------------------------------


def stuck_worker(rank: int) -> None:
    """A loader process waits for ever for an image, as on a disk that is gone."""
    calls, real = 0, dataset.read_crop

    def read_crop(*arguments):
        nonlocal calls
        calls += 1
        if calls > 25:
            Path(os.environ["HERE"], "stuck").write_text(str(os.getpid()))
            threading.Event().wait()
        return real(*arguments)

    dataset.read_crop = read_crop


def is_gone(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_loader_that_hangs_keeps_no_run_from_ending(
    number: signal.Signals, resumable, tmp_path: Path
) -> None:
    argv = resumable("run", 1, "--epochs", "50", "--data.workers", "1")
    argv += ["--checkpoint.every-steps", "1000"]
    options = {"setup": stuck_worker, "environment": {"HERE": str(tmp_path)}}
    run, stuck = tmp_path / "run", tmp_path / "stuck"
    with Crew(argv, 1, tmp_path, **options) as crew:
        # 25 images are 4 updates of 2 x 3 images.
        wait_for(lambda: stuck.exists() and stuck.read_text() and len(losses(run)) >= 2)
        time.sleep(0.5)
        os.kill(crew.processes[0].pid, number)
        assert crew.wait(60) == [75 if number == signal.SIGTERM else -number], crew.text()
    wait_for(lambda: is_gone(int(stuck.read_text())), 20)
    if number == signal.SIGTERM:
        (stopped,) = records(run, "stopped")
        state = read_run_checkpoint(RunFolder(run).newest_checkpoint())
        assert state["step"] == stopped["step"] == max(losses(run)) == 4
        assert "SIGTERM received: saved" in crew.text()


# ---- a scaler that never finds its scale --------------------------------------------------------


def test_a_gradient_that_is_never_finite_ends_a_run_with_a_scaler(
    tiny: Path, photos: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """The loss is finite, and the scaler alone would leave out every update for ever."""
    scaler = functools.partial(torch.amp.GradScaler, enabled=True)
    monkeypatch.setattr(run_module.torch.amp, "GradScaler", lambda device, enabled: scaler(device))
    real = GreenMIM.forward

    def forward(self, *arguments, **options):
        out = real(self, *arguments, **options)
        if out.loss.requires_grad:
            out.loss.register_hook(lambda gradient: gradient * float("nan"))
        return out

    monkeypatch.setattr(GreenMIM, "forward", forward)
    argv = command(tiny, photos, tmp_path / "run", "--epochs", "10", "--max-skipped", "3")
    assert main(argv) == 3
    # 2^16 is 17 halvings above 1/2: those may be the search for a scale.
    assert [r["step"] for r in records(tmp_path / "run", "skipped")] == [18, 19, 20]
    assert "the last 3 updates was not finite" in capsys.readouterr().out


# ---- the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_options_override_the_file_wherever_they_stand(
    form: str, tiny: Path, photos: Path, tmp_path: Path, capsys
) -> None:
    options = f"--epochs 7 {form.format(tiny)} --data.root {photos} --seed=3 --dry-run"
    assert main(["pretrain", "--work-dir", str(tmp_path / "run"), *options.split()]) == 0
    text = capsys.readouterr().out
    assert "epochs: 7" in text and "seed: 3" in text and "embed_dim: 16" in text
    assert main(["pretrain", "--config"]) == 2
    assert "--config" in capsys.readouterr().err
