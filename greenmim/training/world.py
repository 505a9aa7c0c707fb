"""Which process of a run this is: the one place that reads torchrun's and Slurm's environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

_TORCHRUN = {"rank": "RANK", "local_rank": "LOCAL_RANK", "size": "WORLD_SIZE"}
_SRUN = {"rank": "SLURM_PROCID", "local_rank": "SLURM_LOCALID", "size": "SLURM_STEP_NUM_TASKS"}
_FIRST_PORT, _NUM_PORTS = 20000, 20000


@dataclass(frozen=True)
class World:
    """Rank of this process, its rank on this machine, and the number of processes."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and prints."""
        return self.rank == 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> World:
        """torchrun's RANK, LOCAL_RANK and WORLD_SIZE, else those of srun; else one process.

        Raises:
            ValueError: a value is no number, or the rank is not below the size.
        """
        names = _SRUN if _under_srun(environment) else _TORCHRUN
        found = {}
        for name, variable in names.items():
            text = environment.get(variable, "").strip()
            if text and not text.isdigit():
                raise ValueError(
                    f"Environment variable {variable} is {text!r}; it has to be a whole number."
                )
            if text:
                found[name] = int(text)
        world = cls(**found)
        if world.rank >= world.size:
            raise ValueError(
                f"{names['rank']} is {world.rank} but {names['size']} is {world.size}; start"
                " through torchrun or srun."
            )
        return world


def meeting_point(environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Host and port where the processes meet: MASTER_ADDR and MASTER_PORT, else those of srun.

    Under srun the host is the first of the step's nodes, and the port follows from the job's
    number, so that jobs on one node keep apart.

    Raises:
        ValueError: nothing says where, or the port is no number.
    """
    host, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if _under_srun(environment):
        host = host or first_host(environment["SLURM_STEP_NODELIST"])
        job = int(environment.get("SLURM_JOB_ID", "0")) + int(environment["SLURM_STEP_ID"])
        port = port or str(_FIRST_PORT + job % _NUM_PORTS)
    if not host or not port:
        raise ValueError(
            "MASTER_ADDR and MASTER_PORT do not say where to meet; start through torchrun or srun"
        )
    if not port.isdigit():
        raise ValueError(f"MASTER_PORT is {port!r}; it has to be a whole number")
    return host, int(port)


def first_host(nodes: str) -> str:
    """First name of Slurm's list: ``gpu[03-05,9],login1`` -> ``gpu03``."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def _under_srun(environment: Mapping[str, str]) -> bool:
    # A batch script has SLURM_PROCID too, but no step; and torchrun may itself run under srun.
    known = ("SLURM_PROCID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS")
    return "RANK" not in environment and all(name in environment for name in known)
