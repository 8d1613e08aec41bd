"""Which of several processes this one is: `torchrun` and `accelerate launch` say it in the environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """
    rank: of `count` processes, over all machines. local_rank: of the `local_count` on this machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Launch":
        """One process alone where no launcher speaks."""
        if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= environment.keys():
            return cls()
        rank, count, local_rank = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        return cls(rank, count, local_rank, int(environment.get("LOCAL_WORLD_SIZE", count)))


def launch() -> Launch:
    return Launch.of(os.environ)
