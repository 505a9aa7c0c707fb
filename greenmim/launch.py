"""How the processes of a run are started: by torchrun, by srun, or by a Slurm job of ours.

The one place that reads from torchrun's and Slurm's environment which process this is.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field

from greenmim.guards import UserError

_TORCHRUN = {"rank": "RANK", "local_rank": "LOCAL_RANK", "size": "WORLD_SIZE"}
_SRUN = {"rank": "SLURM_PROCID", "local_rank": "SLURM_LOCALID", "size": "SLURM_STEP_NUM_TASKS"}
# Below 32768, from where on Linux gives ports to whoever connects.
_FIRST_PORT, _NUM_PORTS = 20000, 12768


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
            UserError: a value is no number or is missing, or the rank is not below the size.
        """
        names = dict(_SRUN if _under_srun(environment) else _TORCHRUN)
        if "RANK" in environment and not environment.get("LOCAL_RANK", "").strip():
            names["local_rank"] = _SRUN["local_rank"]  # started by srun with variables set by hand
        found = {}
        for name, variable in names.items():
            text = environment.get(variable, "").strip()
            if text.isdigit():
                found[name] = int(text)
            elif text:
                raise UserError(
                    f"Environment variable {variable} is {text!r}; it has to be a whole number."
                )
        world = cls(**found)
        missing = [_TORCHRUN[name] for name in ("rank", "local_rank") if name not in found]
        if world.size > 1 and missing:
            raise UserError(
                f"{names['size']} is {world.size} but {missing[0]} is not set; start through"
                " torchrun or srun, or set it."
            )
        if world.rank >= world.size:
            raise UserError(
                f"{names['rank']} is {world.rank} but {names['size']} is {world.size}; start"
                " through torchrun or srun."
            )
        return world


def speaks(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process tells what all of a run find, also where the rest is set wrongly."""
    return environment.get("RANK", environment.get("SLURM_PROCID", "0")) == "0"


def set_meeting_point(environment: MutableMapping[str, str] = os.environ) -> None:
    """Say in MASTER_ADDR and MASTER_PORT where srun's processes meet, unless that is said already.

    The host is the first of the step's nodes; the port follows from job and step, so that those on
    one node keep apart.
    """
    if not _under_srun(environment):
        return
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    step = ".".join(environment.get(name, "") for name in names)
    environment.setdefault("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
    port = _FIRST_PORT + zlib.crc32(step.encode()) % _NUM_PORTS
    environment.setdefault("MASTER_PORT", str(port))


def first_host(nodes: str) -> str:
    """First name of Slurm's list: ``gpu[03-05,9],login1`` -> ``gpu03``."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def _under_srun(environment: Mapping[str, str]) -> bool:
    # A batch script has SLURM_PROCID too, but no step; and torchrun may itself run under srun.
    known = ("SLURM_PROCID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS")
    return "RANK" not in environment and all(name in environment for name in known)


# Slurm's warning comes three minutes before the end of a job.
SHORTEST_JOB_HOURS = 0.25


@dataclass(frozen=True)
class SlurmJob:
    """Resources to request from Slurm; not part of the recipe.

    Args:
        nodes: Number of machines.
        gpus_per_node: GPUs per machine; one process runs on each.
        partition: Partition; null uses the cluster's default.
        hours: Time limit of one job; before it ends the run saves, and the job is requeued.
        cpus_per_gpu: CPU cores per process, for its loader workers.
        account: Account to charge, where the cluster requires one.
        qos: Quality of service, where the cluster requires one.
        sbatch: Other options of sbatch by name, such as '{"mem": "200G"}'.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    partition: str | None = None
    hours: float = 24.0
    cpus_per_gpu: int = 10
    account: str | None = None
    qos: str | None = None
    sbatch: dict[str, str | int | bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "cpus_per_gpu", "hours"):
            value = getattr(self, name)
            if not value > 0:
                raise UserError(f"--{name.replace('_', '-')} is {value}; it has to be above 0.")
        if self.hours < SHORTEST_JOB_HOURS:
            raise UserError(
                f"--hours is {self.hours}; it has to be at least {SHORTEST_JOB_HOURS}: a shorter"
                " job could make no progress before it is requeued."
            )

    @property
    def processes(self) -> int:
        """Processes of the run."""
        return self.nodes * self.gpus_per_node
