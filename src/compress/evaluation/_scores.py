"""The tasks that need no lm-eval, what a task comes to, and the averages over tasks that papers print."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Format:
    """How lm-eval's task asks: the file's query without `left_out` before and `cut` behind, then `asks`.

    normalised: whether the task has acc_norm.
    """

    left_out: str = ""
    cut: str = ""
    asks: str = ""
    normalised: bool = True

    def context(self, query: str) -> str:
        return query.removeprefix(self.left_out).removesuffix(self.cut) + self.asks


QUESTION = Format(cut="\n", asks="\nAnswer:")
FORMATS = {
    "piqa": QUESTION,
    "arc_easy": QUESTION,
    "arc_challenge": QUESTION,
    "boolq": Format(left_out="Passage: ", asks="\nAnswer:", normalised=False),
    "hellaswag": Format(),
    "winogrande": Format(normalised=False),
    "lambada_openai": Format(normalised=False),
}


@dataclass(frozen=True)
class Metric:
    """error: the standard error, None where it is unknown."""

    value: float
    error: float | None


@dataclass(frozen=True)
class TaskScore:
    """metrics by lm-eval's names. source: who made the requests, `files` or lm-eval with its version."""

    task: str
    source: str
    documents: int
    metrics: dict[str, Metric]

    def to_dict(self) -> dict[str, Any]:
        metrics = {name: {"value": each.value, "standard_error": each.error} for name, each in self.metrics.items()}
        return {"task": self.task, "source": self.source, "documents": self.documents, "metrics": metrics}


def mean(values: Sequence[float]) -> Metric:
    """With the standard error of the mean, as lm-eval takes it: std(ddof=1) / sqrt(n)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Metric(statistics.fmean(values), error)


def averages(scores: Sequence[TaskScore]) -> dict[str, float | None]:
    """Plain means over the tasks: of `acc`, as in SLiM, and of `acc_norm` where a task has it, as in SliceGPT.

    None where a task has no accuracy at all.
    """
    return {"acc": average(scores, "acc"), "acc_norm": average(scores, "acc_norm", "acc")}


def average(scores: Sequence[TaskScore], *preferred: str) -> float | None:
    found = [next((each.metrics[name].value for name in preferred if name in each.metrics), None) for each in scores]
    values = [value for value in found if value is not None]
    return statistics.fmean(values) if values and len(values) == len(found) else None


def preferred_accuracy(score: TaskScore) -> str | None:
    """The metric that enters the second average."""
    return next((name for name in ("acc_norm", "acc") if name in score.metrics), None)
