"""Multiple-choice tasks and LAMBADA from plain files, with the requests and the arithmetic of lm-evaluation-harness.

    acc       the answer with the highest log-likelihood is the right one (LAMBADA: greedy decoding gives the word)
    acc_norm  the same, log-likelihoods divided by the answer's characters, as lm-eval 0.4.13 does

A task of a file that is not named below asks its query as it is, and has both.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from compress.errors import UsageError
from compress.evaluation._scores import FORMATS, Format, Metric, TaskScore, averages, mean, preferred_accuracy
from compress.evaluation._scoring import Likelihood, Request, context_length, log_likelihoods

__all__ = ["TaskScore", "averages", "preferred_accuracy", "requests_of", "score_task"]
Document = Mapping[str, Any]


def requests_of(task: str, document: Document) -> list[Request]:
    """One for each answer that is to be compared; LAMBADA has one."""
    if "choices" in document:
        context = FORMATS.get(task, Format()).context(document["query"])
        return [Request(context, f" {choice}") for choice in document["choices"]]
    if "context_options" in document:
        return [Request(context, f" {document['continuation']}") for context in document["context_options"]]
    return [Request(document["context"], f" {document['continuation']}")]


def score_task(
    task: str,
    documents: Sequence[Document],
    model: nn.Module,
    tokenizer: Any,
    *,
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> TaskScore:
    """The model's accuracy on the documents. `on_batch` is told how many more requests are done."""
    requests = [requests_of(task, document) for document in documents]
    max_length = context_length(model.config, tokenizer)
    flat = [request for each in requests for request in each]
    try:
        scored = log_likelihoods(
            model, tokenizer, flat, max_length=max_length, batch_size=batch_size, on_batch=on_batch
        )
    except UsageError as error:
        raise UsageError(f"The task {task!r} cannot be asked: {error}") from error
    by_document = iter(scored)
    answers = [[next(by_document) for _ in each] for each in requests]
    return TaskScore(task, "files", len(documents), dict(metrics(task, documents, answers)))


def metrics(
    task: str, documents: Sequence[Document], answers: Sequence[Sequence[Likelihood]]
) -> Iterator[tuple[str, Metric]]:
    pairs = list(zip(documents, answers, strict=True))
    if "gold" not in documents[0]:
        yield "acc", mean([float(only.greedy) for _, (only,) in pairs])
        return
    yield "acc", mean([float(best(values(each)) == document["gold"]) for document, each in pairs])
    if FORMATS.get(task, Format()).normalised and "choices" in documents[0]:
        yield (
            "acc_norm",
            mean([float(best(per_character(document, each)) == document["gold"]) for document, each in pairs]),
        )


def values(answers: Sequence[Likelihood]) -> list[float]:
    return [each.value for each in answers]


def per_character(document: Document, answers: Sequence[Likelihood]) -> list[float]:
    """Without the space before an answer. An empty answer would divide by nothing: it counts as one character."""
    return [each.value / max(1, len(choice)) for choice, each in zip(document["choices"], answers, strict=True)]


def best(likelihoods: Sequence[float]) -> int:
    """The first of the largest."""
    return max(range(len(likelihoods)), key=likelihoods.__getitem__)
