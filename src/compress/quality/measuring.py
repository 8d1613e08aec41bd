"""The measures of a loaded model, kept in quality.json beside it if wanted. Only one model is in memory at a time."""

import gc
import importlib.metadata
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from compress.checkpoints.files import write_json
from compress.checkpoints.measures import QUALITY
from compress.durable import in_turn, whole
from compress.errors import CheckpointError, OutputError
from compress.evaluation import humaneval
from compress.evaluation.divergence import Divergence, Reference, divergence, remember
from compress.evaluation.humaneval import HumanEval
from compress.evaluation.perplexity import Perplexity, perplexity
from compress.evaluation.tasks import TaskScore, averages, score_tasks
from compress.models.counting import num_parameters
from compress.models.json_text import parse_json
from compress.progress import Progress, Steps
from compress.quality.subject import Asked, Subject


@dataclass(frozen=True)
class Quality:
    """What was measured of a checkpoint; what was not asked is empty or None."""

    model: str
    bytes: int
    parameters: int
    dtype: str
    perplexity: list[Perplexity]
    divergence: list[Divergence]
    tasks: list[TaskScore]
    humaneval: HumanEval | None
    settings: dict[str, Any]

    @property
    def averages(self) -> dict[str, float | None]:
        """Over the tasks."""
        return averages(self.tasks)

    def sections(self) -> dict[str, Any]:
        """The measures that were asked for, as JSON has them."""
        found: dict[str, Any] = {}
        if self.perplexity:
            found["perplexity"] = [each.to_dict() for each in self.perplexity]
        if self.divergence:
            found["divergence"] = [each.to_dict() for each in self.divergence]
        if self.tasks:
            found["tasks"] = {"scores": [each.to_dict() for each in self.tasks], "average": self.averages}
        if self.humaneval:
            found["humaneval"] = self.humaneval.to_dict()
        return found

    def to_dict(self) -> dict[str, Any]:
        return {"model": self.model, "parameters": self.parameters, "dtype": self.dtype, **self.sections()}


def remember_dense(dense: Subject, model: PreTrainedModel, asked: Asked, progress: Progress) -> dict[str, Reference]:
    """What a divergence needs of the dense model, by text. The model may be freed then."""
    steps = Steps(progress, f"running {dense.name}", sum(len(dense.windows[name]) for name in asked.compared_on))
    return {
        name: remember(
            model,
            dense.windows[name],
            name=dense.name,
            batch_size=asked.batch_size,
            on_batch=counting(steps, name),
        )
        for name in asked.compared_on
    }


def measure(
    subject: Subject, model: PreTrainedModel, asked: Asked, references: Mapping[str, Reference], progress: Progress
) -> Quality:
    """All that was asked, of a loaded model."""
    steps = Steps(progress, f"measuring {subject.name}", amount(subject, asked))
    common = {"batch_size": asked.batch_size}
    return Quality(
        model=subject.name,
        bytes=subject.bytes,
        parameters=num_parameters(model),
        dtype=str(model.dtype),
        perplexity=[
            perplexity(model, subject.windows[name], dataset=name, on_batch=counting(steps, name), **common)
            for name in asked.texts
        ],
        divergence=[
            divergence(
                model,
                references[name],
                subject.windows[name],
                dataset=name,
                on_batch=counting(steps, f"divergence on {name}"),
                **common,
            )
            for name in asked.compared_on
        ],
        tasks=score_tasks(
            asked.tasks, model, subject.tokenizer, limit=asked.limit, on_answer=counting(steps, "tasks"), **common
        ),
        humaneval=written_programs(subject, model, asked, steps),
        settings=settings(asked, model),
    )


def amount(subject: Subject, asked: Asked) -> int:
    """Steps of the progress: windows, requests of tasks, programs that are written and run."""
    windows = sum(len(subject.windows[name]) for name in [*asked.texts, *asked.compared_on])
    requests = sum(task.num_requests(asked.limit) for task in asked.tasks)
    return windows + requests + 2 * len(asked.problems) * asked.sampling.samples


def written_programs(subject: Subject, model: PreTrainedModel, asked: Asked, steps: Steps) -> HumanEval | None:
    if not asked.problems:
        return None
    return humaneval.measure(
        asked.problems,
        model,
        subject.tokenizer,
        asked.sampling,
        batch_size=asked.batch_size,
        on_progress=lambda what, count: counting(steps, f"programs, {what}")(count),
    )


def counting(steps: Steps, name: str) -> Callable[[int], None]:
    """What a measure, which begins, tells how many more windows or answers are done.

    A task of lm-eval's may make more requests than it has documents and choices; the total stays.
    """
    steps.begin(name)
    return lambda count: steps.advance(min(count, int(steps.total - steps.done)))


def settings(asked: Asked, model: PreTrainedModel) -> dict[str, Any]:
    """What a measure depends on beside the model and the text; the rest is in the measures themselves."""
    packages = ("compress-llm", "torch", "transformers", "lm-eval")
    versions = {name: version for name in packages if (version := installed_version(name))}
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "batch_size": asked.batch_size,
        "limit": asked.limit,
        "versions": {"python": platform.python_version()} | versions,
    }


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def free_memory() -> None:
    """Of a model that nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def save(folder: Path, quality: Quality) -> Path:
    """Puts the measures into quality.json beside the checkpoint, whole or not at all.

    A measure that is in there already is replaced, others stay; each has its settings under its own name.
    """
    file = folder / QUALITY
    sections = quality.sections()
    try:
        # Another process may be adding its own measures.
        with in_turn(folder):
            kept = read_saved(file)
            settings = kept.get("settings", {}) | dict.fromkeys(sections, quality.settings)
            with whole(file) as unfinished:
                write_json(unfinished, kept | sections | {"settings": settings})
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error.strerror}. Free space or its folder.") from error
    return file


def read_saved(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        found = parse_json(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not isinstance(found.get("settings", {}), dict):
            raise TypeError
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: it is no JSON object of measures. Delete it.") from error
    return found
