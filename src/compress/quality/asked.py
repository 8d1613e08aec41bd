"""What is to be measured, with the documents and problems that takes; none of it needs a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.datasets import humaneval as humaneval_problems
from compress.datasets import tasks as task_files
from compress.errors import Faults
from compress.evaluation import harness
from compress.evaluation.humaneval import Sampling


@dataclass(frozen=True)
class Asked:
    """
    texts: of perplexity; compared_on: of the divergence. tasks: on files (their documents) and by lm-eval.
    limit: of windows a text, documents a task and problems.
    """

    texts: tuple[str, ...] = ()
    compared_on: tuple[str, ...] = ()
    documents: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    harness_tasks: tuple[str, ...] = ()
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


def gather_tasks(
    names: Sequence[str], data_dir: Path | None, limit: int | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The documents of the tasks that are files, and the names of those that lm-eval is asked for.

    Raises all faults at once: names that nobody knows, files that are missing, lm-eval where it would be needed.
    """
    faults, documents, others = Faults(), {}, []
    on_files = task_files.names(data_dir)
    for name in names:
        with faults.noted():
            if data_dir is not None and name in on_files:
                documents[name] = task_files.load_documents(name, data_dir, limit)
            else:
                harness.check_name(name, on_files)
                others.append(name)
    faults.report()
    if others:
        harness.fetch(others)
    return documents, tuple(others)


def gather_problems(data_dir: Path | None, limit: int | None) -> list[dict[str, str]]:
    return humaneval_problems.load_problems(data_dir, limit)
