"""How processes are started: torchrun, srun, a Slurm job through submitit."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from crew import command, free_port, losses, run_crew

import greenmim.__main__ as start
from greenmim.cli import main
from greenmim.guards import PeerError, UserError
from greenmim.launch import World, first_host, set_meeting_point
from greenmim.recipe import DataConfig, Recipe
from greenmim.training import slurm as slurm_module
from greenmim.training.log import read_log
from greenmim.training.startup import choose_device
from greenmim.training.train import Result

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[03-05,9],login1",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}


def meeting_point(environment: dict[str, str]) -> tuple[str, int]:
    environment = dict(environment)
    set_meeting_point(environment)
    return environment["MASTER_ADDR"], int(environment["MASTER_PORT"])


def test_srun_says_who_and_where() -> None:
    assert World.from_environment(SRUN) == World(9, 1, 16)
    host, port = meeting_point(SRUN)
    assert host == "gpu03" and 20000 <= port < 32768
    chosen = {**SRUN, "MASTER_ADDR": "head", "MASTER_PORT": "5000"}
    assert meeting_point(chosen) == ("head", 5000)
    torchrun = {"RANK": "0"}
    set_meeting_point(torchrun)
    assert torchrun == {"RANK": "0"}


def test_steps_on_one_node_keep_apart() -> None:
    steps = [
        {**SRUN, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}
        for job in range(1000, 1004)
        for step in range(3)
    ]
    ports = [meeting_point(step)[1] for step in steps]
    assert len(set(ports)) == len(ports) and all(20000 <= port < 32768 for port in ports)


def test_a_local_rank_that_nobody_says() -> None:
    torchrun = {"RANK": "5", "WORLD_SIZE": "8"}
    assert World.from_environment({**torchrun, "SLURM_LOCALID": "1"}) == World(5, 1, 8)
    with pytest.raises(UserError, match="WORLD_SIZE is 8 but LOCAL_RANK is not set"):
        World.from_environment(torchrun)
    with pytest.raises(UserError, match="WORLD_SIZE is 8 but RANK is not set"):
        World.from_environment({"LOCAL_RANK": "1", "WORLD_SIZE": "8"})
    assert World.from_environment({"RANK": "0", "WORLD_SIZE": "1"}) == World()


def test_torchrun_under_srun_wins_and_a_batch_script_is_one_process() -> None:
    torchrun = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "8"}
    assert World.from_environment(SRUN | torchrun) == World(3, 3, 8)
    script = {name: value for name, value in SRUN.items() if "STEP" not in name}
    assert World.from_environment(script | {"SLURM_PROCID": "0"}) == World()


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("a1", "a1"), ("a1,a2", "a1"), ("n[007-9]", "n007"), ("r[1-2]n[03,5],x", "r1n03")],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_a_process_without_a_gpu_of_its_own(monkeypatch) -> None:
    recipe = Recipe(work_dir="x", data=DataConfig(root="x"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(recipe.device, World(5, 1, 8)) == torch.device("cuda", 1)
    with pytest.raises(UserError, match="number 3 of its machine, which has 2 GPUs"):
        choose_device(recipe.device, World(3, 3, 4))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # Slurm shows each its own alone
    assert choose_device(recipe.device, World(3, 3, 4)) == torch.device("cuda", 0)


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    common = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return {**os.environ, **common, **more}


def test_torchrun(tiny: Path, photos: Path, tmp_path: Path) -> None:
    # What would run while the interpreter goes: threads of Gloo may end it with SIGABRT then.
    late = "import atexit, os\natexit.register(lambda: 'RANK' in os.environ and print('going'))\n"
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "sitecustomize.py").write_text(late)
    path = os.pathsep.join([str(tmp_path / "late"), environment()["PYTHONPATH"]])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--master-port", str(free_port()), "-m", "greenmim"]
    argv = command(tiny, photos, tmp_path / "two")
    done = subprocess.run(
        [*torchrun, *argv], env=environment(PYTHONPATH=path), capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "going" not in done.stdout and "finished: 2 epochs" in done.stdout
    assert done.stdout.count("step ") == 4 and "2 processes (ddp)" in done.stdout
    run_crew(command(tiny, photos, tmp_path / "one", "--optim.accumulate", "2"), 1, tmp_path)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-6)


@pytest.mark.parametrize("code", [0, 2, 75])
def test_one_of_several_ends_with_its_code(code: int, monkeypatch) -> None:
    ended = []
    monkeypatch.setattr("greenmim.cli.main", lambda: code)
    monkeypatch.setattr(os, "_exit", ended.append)
    with pytest.raises(SystemExit) as left:
        start.script()
    assert left.value.code == code and not ended
    monkeypatch.setattr("greenmim.processes.Processes.joined", True)
    with pytest.raises(SystemExit):  # as `_exit` came back
        start.script()
    assert ended == [code]


def test_one_of_several_shows_an_error_of_ours(monkeypatch, capsys) -> None:
    def fail() -> int:
        raise KeyError("lost")

    ended = []
    monkeypatch.setattr("greenmim.cli.main", fail)
    monkeypatch.setattr(os, "_exit", ended.append)
    with pytest.raises(KeyError):
        start.script()
    monkeypatch.setattr("greenmim.processes.Processes.joined", True)
    with pytest.raises(SystemExit):
        start.script()
    assert ended == [1] and "KeyError: 'lost'" in capsys.readouterr().err


# ---- a job --------------------------------------------------------------------------------------

SBATCH = """#!/bin/bash
cp "${@: -1}" "$SLURM_HERE/job.sh"
echo "Submitted batch job 42"
"""
# Starts a process for each task, as srun does.
SRUN_PROGRAM = """#!/bin/bash
while [[ $1 == -* ]]; do [[ $1 == --output || $1 == --error ]] && shift; shift; done
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" >> "$SLURM_HERE/out_$rank" 2>&1 &
    echo $! >> "$SLURM_HERE/pids"
done
wait
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$SLURM_HERE/requeued"
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs that stand in for Slurm's, on the path; the folder where they write."""
    here = tmp_path / "slurm_here"
    here.mkdir()
    programs = {"sbatch": SBATCH, "srun": SRUN_PROGRAM, "scontrol": SCONTROL}
    for name, text in programs.items():
        (here / name).write_text(text)
        (here / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{here}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_HERE", str(here))
    return here


def test_a_slurm_job_runs_stops_at_its_limit_and_goes_on(
    slurm: Path, tiny: Path, photos: Path, tmp_path: Path, capsys
) -> None:
    run = tmp_path / "run"
    more = ("--launcher", "slurm", "--partition", "gpu", "--nodes", "1", "--gpus-per-node", "2")
    argv = command(tiny, photos, run, "--epochs", "20", *more)
    more = ("--sbatch", '{"mem": "200G", "exclusive": true}')
    assert main([*argv, "--hours", "2", "--account", "lab", *more]) == 0
    text = capsys.readouterr().out
    assert "submitted job 42" in text and "steps per epoch  2" in text
    job = (slurm / "job.sh").read_text()
    for wanted in (
        *("partition=gpu", "nodes=1", "ntasks-per-node=2", "time=120", "account=lab"),
        *("signal=USR2@180", "requeue", "cpus-per-task=10", "mem=200G", "exclusive"),
    ):
        assert f"#SBATCH --{wanted}\n" in job
    assert "--kill-on-bad-exit=1" in job
    assert "gpus-per-node" not in job  # the tiny recipe is for the CPU

    step = {
        **{"SLURM_JOB_ID": "42", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "127.0.0.1"},
        **{"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "1"},
        **{"SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "127.0.0.1"},
        "MASTER_PORT": str(free_port()),
    }
    with subprocess.Popen(["bash", slurm / "job.sh"], env=environment(**step)) as process:
        end = time.monotonic() + 90
        while not (run / "log.jsonl").exists() or len(losses(run)) < 3:
            assert process.poll() is None and time.monotonic() < end, outputs(slurm)
            time.sleep(0.02)
        # Slurm's warning goes to every process of the job.
        for pid in map(int, (slurm / "pids").read_text().split()):
            os.kill(pid, signal.SIGUSR2)
        assert process.wait(60) == 0, outputs(slurm)
    stopped = read_log(run / "log.jsonl")[-1]
    assert stopped["event"] == "stopped" and stopped["signal"] == "SIGUSR2", outputs(slurm)
    assert (slurm / "requeued").read_text() == "requeue 42\n"
    assert subprocess.run(["bash", slurm / "job.sh"], env=environment(**step)).returncode == 0
    assert losses(run).keys() == set(range(1, 41)), outputs(slurm)
    starts = [r["step"] for r in read_log(run / "log.jsonl") if r["event"] == "start"]
    assert starts == [0, stopped["step"]]
    assert (slurm / "requeued").read_text() == "requeue 42\n"  # finished: not again


@pytest.mark.parametrize(
    ("ends", "code"),
    [(0, 0), (3, 3), (75, 75), (UserError("no images"), 2), (PeerError("no images"), 4)],
)
def test_slurm_sees_how_a_run_ended(ends, code: int, monkeypatch, capsys) -> None:
    def train(recipe, resume, max_steps, profile):
        if isinstance(ends, Exception):
            raise ends
        return Result(ends, 1, None)

    monkeypatch.setattr(slurm_module, "train", train)
    piece = slurm_module.Piece(Recipe(work_dir="x", data=DataConfig(root="x")), "auto")
    if code == 0:
        assert piece() == 0
        return
    with pytest.raises(SystemExit) as left:
        piece()
    assert left.value.code == code
    told = "greenmim: error: no images" in capsys.readouterr().err
    assert told == isinstance(ends, Exception)


def test_a_job_that_slurm_does_not_requeue(slurm: Path, monkeypatch, capsys) -> None:
    (slurm / "scontrol").write_text("#!/bin/bash\nexit 1\n")
    ended = Result(75, 1, None, signal.SIGUSR2)
    monkeypatch.setattr(slurm_module, "train", lambda *_: ended)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    with pytest.raises(SystemExit) as left:
        slurm_module.Piece(Recipe(work_dir="x", data=DataConfig(root="x")), "auto")()
    assert left.value.code == 2
    assert "Slurm does not requeue job 42: submit it again" in capsys.readouterr().err


def outputs(slurm: Path) -> str:
    return "\n".join(file.read_text()[-2000:] for file in slurm.glob("out_*"))


def test_a_job_is_checked_before_it_is_submitted(
    slurm: Path, tiny: Path, photos: Path, tmp_path: Path, capsys
) -> None:
    argv = command(tiny, photos, tmp_path / "run", "--launcher", "slurm")
    assert main([*argv, "--nodes", "0"]) == 2
    assert "--nodes is 0" in capsys.readouterr().err
    assert main([*argv, "--hours", "0.05"]) == 2
    assert "--hours is 0.05" in capsys.readouterr().err
    assert main([*argv, "--nodes", "3"]) == 2  # 24 processes x 3 images > 12
    assert "fewer than the 72 of one update" in capsys.readouterr().err
    assert main([*argv, "--gpus-per-node", "2", "--dry-run"]) == 0
    assert not (slurm / "job.sh").exists() and not (tmp_path / "run").exists()


def test_without_slurm(tiny: Path, photos: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    argv = command(tiny, photos, tmp_path / "run", "--launcher", "slurm", "--gpus-per-node", "1")
    assert main(argv) == 2
    assert "there is no sbatch and srun here" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
