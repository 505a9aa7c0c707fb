"""Runs of several processes, as torchrun starts them, without starting Python anew for each.

A fork server imports everything once; each process is a fork of it with the environment of its
rank, its output in a file.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from greenmim.training.log import read_log

EVERY = 2  # updates between two checkpoints of `conftest.command`

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["greenmim.cli", "greenmim.training.train", "torch.utils.tensorboard"]
)


class Crew:
    """Processes of one run, started at once; a context manager that leaves none behind.

    Args:
        argv: Arguments of `greenmim`.
        size: Number of processes.
        folder: Where their output goes.
        setup: Called in every process before the run with its rank; a function of a test module.
        environment: More variables.
    """

    def __init__(
        self,
        argv: Sequence[str],
        size: int,
        folder: Path,
        setup: Callable[[int], None] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.outputs = [folder / f"output_{rank}.txt" for rank in range(size)]
        common = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **(environment or {})}
        if size > 1:
            port = str(free_port())
            common |= {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.processes = []
        for rank, output in enumerate(self.outputs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {}
            arguments = (list(argv), common | own, output, setup, rank)
            self.processes.append(context.Process(target=_work, args=arguments))

    def __enter__(self) -> Crew:
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def wait(self, seconds: float = 120.0) -> list[int | None]:
        """Exit codes by rank; None for a process that is still running when time is up."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(end - time.monotonic(), 0.0))
        return [process.exitcode for process in self.processes]

    def text(self, rank: int = 0) -> str:
        """What a process printed, stdout and stderr."""
        return self.outputs[rank].read_text()


def run_crew(argv: Sequence[str], size: int, folder: Path, **options) -> str:
    """A run that has to end well in all its processes; what the main process printed."""
    folder.mkdir(exist_ok=True)
    with Crew(argv, size, folder, **options) as crew:
        codes = crew.wait()
    assert codes == [0] * size, "\n".join(
        [str(codes), *(crew.text(rank)[-1500:] for rank in range(size))]
    )
    return crew.text()


def command(tiny: Path, photos: Path, work_dir: Path, *more: str) -> list[str]:
    """Arguments of the tiny run."""
    return [
        *("pretrain", "--config", str(tiny), "--data.root", str(photos)),
        *("--work-dir", str(work_dir), *more),
    ]


def records(folder: Path, event: str) -> list[dict]:
    """The records of one kind in a run's log; none before there is one."""
    log = folder / "log.jsonl"
    return [r for r in read_log(log) if r["event"] == event] if log.exists() else []


def losses(folder: Path) -> dict[int, float]:
    """The logged losses by update."""
    return {r["step"]: r["loss"] for r in records(folder, "train")}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a run's last checkpoint."""
    return torch.load(folder / "checkpoints" / "last.pth", weights_only=True)["model"]


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Look again and again until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _work(
    argv: list[str],
    environment: dict[str, str],
    output: Path,
    setup: Callable[[int], None] | None,
    rank: int,
) -> None:
    gc.freeze()  # what the fork server has imported is no garbage, and to look at it copies it
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # for loader workers, as in a program
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    from greenmim.cli import main

    if setup is not None:
        setup(rank)
    code = main(argv)
    sys.stdout.flush()
    sys.exit(code)
