"""Which of several processes this one is, and scripts in child processes that are killed when their parent exits.

    python FLAG process.py SCRIPT ARGUMENTS...

The child watches its standard input, a pipe whose other end only its parent has, and which closes with the parent.
"""

import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """What `torchrun` and `accelerate launch` say in the environment.

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


def run_in_child(
    flag: str, script: str, arguments: Sequence[str], variables: Mapping[str, str]
) -> "subprocess.CompletedProcess[str]":
    """Run a script, killed when this process exits. flag: Python's, -I or -P. variables: added to the environment."""
    reading, writing = os.pipe()
    command = [sys.executable, flag, __file__, script, *arguments]
    try:
        return subprocess.run(
            command, stdin=reading, env=os.environ | variables, capture_output=True, text=True, check=False
        )
    finally:
        os.close(reading)
        os.close(writing)


def exit_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=exit_with_parent, daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
