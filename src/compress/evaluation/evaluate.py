"""All requested measures of a loaded model. Models come one after another: only one is in memory at a time."""

import gc
import importlib.metadata
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from compress.checkpoints.quality import Divergence, HumanEval, Perplexity, Quality, Tasks
from compress.evaluation import humaneval
from compress.evaluation.divergence import Reference, divergence, remember
from compress.evaluation.perplexity import perplexity
from compress.evaluation.subject import Request, Subject
from compress.evaluation.tasks import averages, score_tasks
from compress.models.storage import num_parameters
from compress.progress import Progress, Steps


@dataclass(frozen=True)
class Evaluation:
    """
    bytes: of the files that hold the weights. dtype: that was computed in. quality: with only what was requested set.
    """

    model: str
    bytes: int
    parameters: int
    dtype: str
    quality: Quality

    def to_dict(self) -> dict[str, Any]:
        measured = {name: each for name, each in self.quality.to_dict().items() if name != "settings"}
        return {"model": self.model, "parameters": self.parameters, "dtype": self.dtype, **measured}


def remember_dense(
    dense: Subject, model: PreTrainedModel, request: Request, progress: Progress
) -> dict[str, Reference]:
    """What a divergence needs of the dense model, by text. The model may be freed then."""
    steps = Steps(progress, f"running {dense.name}", sum(len(dense.windows[name]) for name in request.compared_on))
    return {
        name: remember(
            model,
            dense.windows[name],
            name=dense.name,
            batch_size=request.batch_size,
            on_batch=counting(steps, name),
        )
        for name in request.compared_on
    }


def measure(
    subject: Subject, model: PreTrainedModel, request: Request, references: Mapping[str, Reference], progress: Progress
) -> Evaluation:
    """All that was requested, of a loaded model."""
    steps = Steps(progress, f"measuring {subject.name}", num_steps(subject, request))
    measured: dict[str, Any] = {}
    if request.texts:
        measured["perplexity"] = [perplexity_on(name, subject, model, request, steps) for name in request.texts]
    if request.compared_on:
        measured["divergence"] = [
            divergence_on(references[name], name, subject, model, request, steps) for name in request.compared_on
        ]
    if request.tasks:
        measured["tasks"] = scores_of(subject, model, request, steps)
    if request.problems:
        measured["humaneval"] = programs_of(subject, model, request, steps)
    settings = dict.fromkeys(measured, settings_of(request, model))
    return Evaluation(
        model=subject.name,
        bytes=subject.bytes,
        parameters=num_parameters(model),
        dtype=str(model.dtype),
        quality=Quality(**measured, settings=settings),
    )


def num_steps(subject: Subject, request: Request) -> int:
    """Steps of the progress: windows, requests of tasks, programs that are written and run."""
    windows = sum(len(subject.windows[name]) for name in [*request.texts, *request.compared_on])
    requests = sum(task.num_requests(request.limit) for task in request.tasks)
    return windows + requests + 2 * len(request.problems) * request.sampling.samples


def perplexity_on(name: str, subject: Subject, model: PreTrainedModel, request: Request, steps: Steps) -> Perplexity:
    windows, on_batch = subject.windows[name], counting(steps, name)
    return perplexity(model, windows, dataset=name, batch_size=request.batch_size, on_batch=on_batch)


def divergence_on(
    reference: Reference, name: str, subject: Subject, model: PreTrainedModel, request: Request, steps: Steps
) -> Divergence:
    windows, on_batch = subject.windows[name], counting(steps, f"divergence on {name}")
    return divergence(model, reference, windows, dataset=name, batch_size=request.batch_size, on_batch=on_batch)


def scores_of(subject: Subject, model: PreTrainedModel, request: Request, steps: Steps) -> Tasks:
    scores = score_tasks(
        request.tasks,
        model,
        subject.tokenizer,
        batch_size=request.batch_size,
        limit=request.limit,
        on_answer=counting(steps, "tasks"),
    )
    return Tasks(scores=scores, average=averages(scores))


def programs_of(subject: Subject, model: PreTrainedModel, request: Request, steps: Steps) -> HumanEval:
    return humaneval.measure(
        request.problems,
        model,
        subject.tokenizer,
        request.sampling,
        batch_size=request.batch_size,
        on_progress=lambda what, count: counting(steps, f"programs, {what}")(count),
    )


def counting(steps: Steps, name: str) -> Callable[[int], None]:
    """Begin the measure of this name; the function returned counts windows or answers that are done.

    A task of lm-eval's may make more requests than it has documents and choices; the total stays.
    """
    steps.begin(name)
    return lambda count: steps.advance(min(count, int(steps.total - steps.done)))


def settings_of(request: Request, model: PreTrainedModel) -> dict[str, Any]:
    """What a measure depends on besides the model and the text; the rest is in the measures themselves."""
    packages = ("compress-llm", "torch", "transformers", "lm-eval")
    versions = {name: version for name in packages if (version := installed_version(name))}
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "batch_size": request.batch_size,
        "limit": request.limit,
        "versions": {"python": platform.python_version()} | versions,
    }


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def free_memory() -> None:
    """Free the memory of a model that nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
