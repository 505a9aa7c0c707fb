"""Which process of a run this is: the one place that reads torchrun's and Slurm's environment."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

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
            ValueError: a value is no number or is missing, the rank is not below the size, or
                something else started several processes.
        """
        names = dict(_SRUN if _under_srun(environment) else _TORCHRUN)
        _refuse_mpirun(environment)
        if "RANK" in environment and not environment.get("LOCAL_RANK", "").strip():
            names["local_rank"] = _SRUN["local_rank"]  # started by srun with variables set by hand
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
        for name in ("rank", "local_rank"):
            if world.size > 1 and name not in found:
                raise ValueError(
                    f"{names['size']} is {world.size} but {_TORCHRUN[name]} is not set; start"
                    " through torchrun or srun, or set it."
                )
        if world.rank >= world.size:
            raise ValueError(
                f"{names['rank']} is {world.rank} but {names['size']} is {world.size}; start"
                " through torchrun or srun."
            )
        return world


def meeting_point(environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Host and port where the processes meet: MASTER_ADDR and MASTER_PORT, else those of srun.

    Under srun the host is the first of the step's nodes, and the port follows from job and step, so
    that those on one node keep apart.

    Raises:
        ValueError: nothing says where, or the port is no number.
    """
    host, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if _under_srun(environment):
        host = host or first_host(environment["SLURM_STEP_NODELIST"])
        port = port or str(_FIRST_PORT + zlib.crc32(run_name(environment).encode()) % _NUM_PORTS)
    if not host or not port:
        raise ValueError(
            "MASTER_ADDR and MASTER_PORT do not say where to meet; start through torchrun or srun"
        )
    if not port.isdigit():
        raise ValueError(f"MASTER_PORT is {port!r}; it has to be a whole number")
    return host, int(port)


def run_name(environment: Mapping[str, str] = os.environ) -> str:
    """A name that the processes of one start share: of a job's step, or of torchrun's run."""
    if _under_srun(environment):
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    else:
        names = ("TORCHELASTIC_RUN_ID",)
    return ".".join(environment.get(name, "") for name in names)


def launcher_note(environment: Mapping[str, str] = os.environ) -> str | None:
    """What torchrun would do to a run that is asked to stop, where it was not told otherwise."""
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    known = environment.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "").split(",")
    advice = []
    if "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" not in environment:
        advice.append("kills a save 30 s after SIGTERM unless --shutdown-timeout says otherwise")
    if "SIGUSR1" not in known:
        advice.append("ends without a save at SIGUSR1 unless --signals-to-handle names it")
    return f"torchrun {' and '.join(advice)}" if advice else None


def first_host(nodes: str) -> str:
    """First name of Slurm's list: ``gpu[03-05,9],login1`` -> ``gpu03``."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def _refuse_mpirun(environment: Mapping[str, str]) -> None:
    # Every process would take itself for the only one, and all would write to one folder. Under
    # Slurm mpirun starts its own processes through srun, whose variables do not count then; but
    # srun's own protocol sets PMI_SIZE.
    if "RANK" in environment:
        return
    names = ["OMPI_COMM_WORLD_SIZE"] + ([] if _under_srun(environment) else ["PMI_SIZE"])
    for name in names:
        size = environment.get(name, "")
        if size.isdigit() and int(size) > 1:
            raise ValueError(
                f"mpirun started {size} processes ({name}), but not as those of one run; start"
                " through torchrun or srun, or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and"
                " MASTER_PORT for each."
            )


def _under_srun(environment: Mapping[str, str]) -> bool:
    # A batch script has SLURM_PROCID too, but no step; and torchrun may itself run under srun.
    known = ("SLURM_PROCID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS")
    return "RANK" not in environment and all(name in environment for name in known)
