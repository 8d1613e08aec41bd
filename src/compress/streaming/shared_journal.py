"""The journal of several processes: the first one writes it, all go by it.

Each process has streams of its own and so a state of its own, in a file beside the first one's. A part counts when the
state behind it has reached the disk in every process. The folder must be one that all of them see.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.streaming.journal import SEAL, Journal, write_tensors
from compress.streaming.processes import Processes


class SharedJournal(Journal):
    """own: the first process's journal; None in the others."""

    def __init__(self, folder: Path, identity: dict[str, Any], own: Journal | None, processes: Processes) -> None:
        lines = None if own is None else [{"run": identity, SEAL: own.seal}, *own.findings.values(), *own.entries]
        super().__init__(folder, identity, None, processes.from_first(lines))
        self.own = own
        self.processes = processes

    def note(
        self, name: str, data: Any, tensors: dict[str, Tensor] | None = None, files: Sequence[dict[str, Any]] = ()
    ) -> None:
        if self.own is not None:
            self.own.note(name, data, tensors, files)
        self.findings[name] = self.processes.from_first(None if self.own is None else self.own.findings[name])

    def record(self, entry: dict[str, Any], state: dict[str, Tensor]) -> None:
        number, rank = len(self.entries), self.processes.rank
        mine = None if self.own else write_tensors(self.folder / f"state-{number:05d}-{rank}.safetensors", state)
        others = self.processes.gathered(mine)[1:]
        if self.own is not None:
            self.own.record(entry | {"other_states": others}, state)
        self.entries.append(self.processes.from_first(None if self.own is None else self.own.entries[-1]))

    def state_file(self) -> str:
        entry = self.entries[-1]
        states = [entry["state"], *entry["other_states"]]
        name: str = states[self.processes.rank]["file"]
        return name

    def forget(self) -> None:
        if self.own is not None:
            self.own.forget()
