"""Checkpoints that are measured: all that can be checked before a weight is read, then measure after measure.

Models come one after another: only one is in memory at a time.
"""

import importlib.metadata
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from compress.calibration.weights import LazyWeights
from compress.checkpoints.metadata import versions
from compress.checkpoints.quality import Quality, Tasks
from compress.datasets.windows import evaluation_windows, fingerprint
from compress.errors import Problems, UsageError
from compress.evaluation import generation
from compress.evaluation.footprint import bytes_on_disk
from compress.evaluation.llamacpp import LlamaCpp, gguf_file
from compress.evaluation.tasks import LoadedTask, averages, score_tasks
from compress.evaluation.windows import Reference, Subject, Windows, divergence, perplexity, perplexity_of, remember
from compress.models.loading import check_positions, check_vocabulary, load_config, load_tokenizer
from compress.models.storage import num_parameters
from compress.progress import Progress, Steps

USUAL_SEQ_LEN = 2048


@dataclass(frozen=True)
class Request:
    """What to measure. texts: of perplexity; compared_on: of the divergence. limit: of windows, documents, problems."""

    texts: Sequence[str] = ()
    compared_on: Sequence[str] = ()
    tasks: Sequence[LoadedTask] = ()
    problems: Sequence[Mapping[str, str]] = ()
    sampling: generation.Sampling = field(default_factory=generation.Sampling)
    seq_len: int | None = None
    limit: int | None = None
    batch_size: int = 8
    data_dir: Path | None = None
    trust_remote_code: bool = False


def prepare(name: str, folder: Path, request: Request) -> Subject:
    """The checkpoint with its texts cut into windows. Raises all problems of its config, files, tokenizer and texts."""
    problems, windows = Problems(), Windows()
    config = load_config(folder, trust_remote_code=request.trust_remote_code)
    text_config = config.get_text_config()
    length = request.seq_len or min(USUAL_SEQ_LEN, getattr(text_config, "max_position_embeddings", USUAL_SEQ_LEN))
    texts = dict.fromkeys([*request.texts, *request.compared_on])
    if texts:
        with problems.collect():
            check_positions(text_config, length)
    with problems.collect():
        LazyWeights(folder)
    with problems.collect():
        tokenizer = load_tokenizer(folder, trust_remote_code=request.trust_remote_code)
        how: dict[str, Any] = {"seq_len": length, "data_dir": request.data_dir, "limit": request.limit}
        for text in texts:
            with problems.collect():
                windows[text] = evaluation_windows(text, tokenizer, **how)
                check_vocabulary(windows[text], config, folder)
    problems.report()
    return Subject(name, folder, config, tokenizer, windows)


def check_same_tokens(dense: Subject, subjects: Sequence[Subject]) -> None:
    """That a divergence means something: the same vocabulary, and the texts cut alike."""
    problems = Problems()
    for subject in subjects:
        with problems.collect():
            sizes = [each.config.get_text_config().vocab_size for each in (dense, subject)]
            cut_alike = all(torch.equal(subject.windows[name], dense.windows[name]) for name in dense.windows)
            if sizes[0] != sizes[1] or not cut_alike:
                what = f"vocabularies of {sizes[0]:,} and {sizes[1]:,}" if sizes[0] != sizes[1] else "other tokens"
                raise UsageError(
                    f"--kl: {dense.name} and {subject.name} have {what} for the same text, so their next-token "
                    "distributions do not compare. Name the dense model that was compressed."
                )
    problems.report()


def cut_otherwise(subjects: Sequence[Subject]) -> list[str]:
    """A note on those whose tokens for the same texts are other ones than the first's: perplexities do not compare."""
    prints = [[fingerprint(each) for each in subject.windows.values()] for subject in subjects]
    names = ", ".join(subject.name for subject, each in zip(subjects, prints, strict=True) if each != prints[0])
    first = subjects[0].name
    return [f"Of other windows than {first}'s, so not to be compared with it: perplexity of {names}."] if names else []


# Measuring.


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a model.

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
    size = request.batch_size
    return {
        name: remember(model, dense.windows[name], name=dense.name, batch_size=size, on_batch=counting(steps, name))
        for name in request.compared_on
    }


def measure(
    subject: Subject, model: PreTrainedModel, request: Request, references: Mapping[str, Reference], progress: Progress
) -> Evaluation:
    """All that was requested, of a loaded model."""
    # Windows, requests of tasks, programs that are written and run.
    total = sum(len(subject.windows[name]) for name in [*request.texts, *request.compared_on])
    total += sum(task.num_requests(request.limit) for task in request.tasks)
    total += 2 * len(request.problems) * request.sampling.samples
    steps = Steps(progress, f"measuring {subject.name}", total)
    windows, size = subject.windows, request.batch_size
    measured: dict[str, Any] = {}
    for name in request.texts:
        found = perplexity(model, windows[name], dataset=name, batch_size=size, on_batch=counting(steps, name))
        measured.setdefault("perplexity", []).append(found)
    for name in request.compared_on:
        on_batch = counting(steps, f"divergence on {name}")
        far = divergence(model, references[name], windows[name], dataset=name, batch_size=size, on_batch=on_batch)
        measured.setdefault("divergence", []).append(far)
    if request.tasks:
        how: dict[str, Any] = {"batch_size": size, "limit": request.limit, "on_answer": counting(steps, "tasks")}
        scores = score_tasks(request.tasks, model, subject.tokenizer, **how)
        measured["tasks"] = Tasks(scores=scores, average=averages(scores))
    if request.problems:
        measured["humaneval"] = generation.measure(
            request.problems,
            model,
            subject.tokenizer,
            request.sampling,
            batch_size=size,
            on_progress=lambda what, count: counting(steps, f"programs, {what}")(count),
        )
    return evaluation_of(subject, request, measured, model.dtype, num_parameters(model), device=model.device.type)


def measure_in_llamacpp(subject: Subject, request: Request, progress: Progress) -> Evaluation:
    """Perplexity of a GGUF file as llama.cpp itself computes it, token by token."""
    weights = LazyWeights(subject.folder)
    file, size = gguf_file(subject.folder, subject.name), subject.config.vocab_size
    steps = Steps(progress, f"measuring {subject.name}", sum(len(subject.windows[name]) for name in request.texts))
    engine = LlamaCpp(file, context=max(each.shape[1] for each in subject.windows.values()), vocabulary=size)
    found = []
    for name in request.texts:
        start, losses, on_window = time.perf_counter(), list[float](), counting(steps, name)
        for window in subject.windows[name]:
            losses.append(engine.loss(window))
            on_window(1)
        found.append(perplexity_of(losses, name, subject.windows[name], start))
    parameters = sum(math.prod(tensor.shape) for tensor in weights.stored.tensors.values())
    return evaluation_of(subject, request, {"perplexity": found}, "llama.cpp", parameters, device="cpu")


def evaluation_of(
    subject: Subject, request: Request, measured: Mapping[str, Any], dtype: object, parameters: int, *, device: str
) -> Evaluation:
    # What a measure depends on besides the model and the text; the rest is in the measures themselves.
    settings = {
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "batch_size": request.batch_size,
        "limit": request.limit,
        "versions": versions() | ({"lm-eval": importlib.metadata.version("lm-eval")} if request.tasks else {}),
    }
    return Evaluation(
        model=subject.name,
        bytes=bytes_on_disk(subject.folder),
        parameters=parameters,
        dtype=str(dtype),
        quality=Quality(**measured, settings=dict.fromkeys(measured, settings)),
    )


def counting(steps: Steps, name: str) -> Callable[[int], None]:
    """Begin the measure of this name; the function returned counts windows or answers that are done.

    A task of lm-eval's may make more requests than it has documents and choices; the total stays.
    """
    steps.begin(name)
    return lambda count: steps.advance(min(count, int(steps.total - steps.done)))
