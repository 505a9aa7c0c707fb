"""Which process of a run this is: the one place that reads torchrun's and Slurm's environment."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping, MutableMapping
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
            ValueError: a value is no number or is missing, or the rank is not below the size.
        """
        names = dict(_SRUN if _under_srun(environment) else _TORCHRUN)
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


def set_meeting_point(environment: MutableMapping[str, str] = os.environ) -> None:
    """Say in MASTER_ADDR and MASTER_PORT where srun's processes meet, as torchrun does for its own.

    The host is the first of the step's nodes; the port follows from job and step, so that those on
    one node keep apart. Where they are set already, they stay.
    """
    if not _under_srun(environment):
        return
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    step = ".".join(environment.get(name, "") for name in names)
    environment.setdefault("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
    port = _FIRST_PORT + zlib.crc32(step.encode()) % _NUM_PORTS
    environment.setdefault("MASTER_PORT", str(port))


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


def _under_srun(environment: Mapping[str, str]) -> bool:
    # A batch script has SLURM_PROCID too, but no step; and torchrun may itself run under srun.
    known = ("SLURM_PROCID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS")
    return "RANK" not in environment and all(name in environment for name in known)
