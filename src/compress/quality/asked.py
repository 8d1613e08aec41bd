"""What is to be measured, with the documents and problems that takes; none of it needs a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from compress.datasets.tasks import local_tasks, read_documents
from compress.errors import Faults
from compress.evaluation.humaneval import Sampling
from compress.evaluation.tasks import LoadedTask, check_installed, load_hub_task, load_local_task


@dataclass(frozen=True)
class Asked:
    """
    texts: of perplexity; compared_on: of the divergence. limit: of windows a text, documents a task and problems.
    """

    texts: tuple[str, ...] = ()
    compared_on: tuple[str, ...] = ()
    tasks: Sequence[LoadedTask] = ()
    problems: Sequence[Mapping[str, str]] = ()
    sampling: Sampling = field(default_factory=Sampling)
    seq_len: int | None = None
    limit: int | None = None
    batch_size: int = 8
    data_dir: Path | None = None
    trust_remote_code: bool = False

    @property
    def windows_of(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*self.texts, *self.compared_on]))


def load_tasks(names: Sequence[str], data_dir: Path | None) -> list[LoadedTask]:
    """The tasks with their data, from a file where there is one, else from the hub. Raises all faults at once."""
    if not names:
        return []
    check_installed()
    files = local_tasks(data_dir)
    faults, loaded = Faults(), []
    for name in names:
        with faults.noted():
            if name in files:
                loaded.append(load_local_task(name, read_documents(files[name])))
            else:
                loaded += load_hub_task(name, sorted(files))
    faults.report()
    return loaded
