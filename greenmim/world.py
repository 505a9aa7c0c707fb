"""Which process of a run this is: the one place that reads torchrun's environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


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
        """Read RANK, LOCAL_RANK and WORLD_SIZE; without them, a run of one process.

        Raises:
            ValueError: a value is no number, or RANK is not below WORLD_SIZE.
        """
        names = {"rank": "RANK", "local_rank": "LOCAL_RANK", "size": "WORLD_SIZE"}
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
                f"RANK is {world.rank} but WORLD_SIZE is {world.size}; start through torchrun."
            )
        return world
