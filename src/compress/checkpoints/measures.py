"""quality.json beside a checkpoint, read back: what `compress eval --save` has measured of it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated

from pydantic import Field, ValidationError

from compress.checkpoints.facts import Told, first_fault, read_json
from compress.errors import CheckpointError

QUALITY = "quality.json"
Share = Annotated[float, Field(ge=0, le=1)]
Above = Annotated[float, Field(ge=0)]
SHOWN = ("acc", "acc_norm", "exact_match", "perplexity")  # of a task's metrics


@dataclass(frozen=True)
class Measure:
    """
    name: what was measured, and on what. unit: None for a number without. error: the standard error, where it is known.
    """

    name: str
    value: float
    error: float | None
    unit: str | None = None
    lower_is_better: bool = True

    @property
    def text(self) -> str:
        unit = "" if self.unit is None else f" {self.unit}"
        return f"{self.value:.4g}" + ("" if self.error is None else f" ± {self.error:.2g}") + unit


class OnText(Told):
    dataset: str
    seq_len: int
    standard_error: Above | None = None

    @property
    def where(self) -> str:
        """A text of one's own is named by its file alone."""
        return f"{PurePath(self.dataset).name}, windows of {self.seq_len}"


class Perplexity(OnText):
    ppl: Above


class Divergence(OnText):
    kl: float
    agreement: Share


class Metric(Told):
    value: float
    standard_error: Above | None = None


class Task(Told):
    task: str
    metrics: Mapping[str, Metric]


class Tasks(Told):
    scores: Sequence[Task]
    average: Mapping[str, float | None] = Field(default_factory=dict)


class HumanEval(Told):
    rates: Mapping[str, Metric]


class Measures(Told):
    perplexity: Sequence[Perplexity] = ()
    divergence: Sequence[Divergence] = ()
    tasks: Tasks | None = None
    humaneval: HumanEval | None = None

    def listed(self) -> list[Measure]:
        return [*self._on_texts(), *self._on_tasks(), *self._written()]

    def _on_texts(self) -> Iterator[Measure]:
        for each in self.perplexity:
            yield Measure(f"perplexity on {each.where}", each.ppl, each.standard_error)
        for one in self.divergence:
            yield Measure(f"divergence from dense on {one.where}", one.kl, one.standard_error, "nats a token")
            name = f"same likeliest token as dense on {one.where}"
            yield Measure(name, 100 * one.agreement, None, "%", lower_is_better=False)

    def _on_tasks(self) -> Iterator[Measure]:
        for each in self.tasks.scores if self.tasks else []:
            for name in SHOWN:
                if name in each.metrics:
                    metric, lower = each.metrics[name], name == "perplexity"
                    yield Measure(f"{each.task}, {name}", metric.value, metric.standard_error, lower_is_better=lower)
        if self.tasks and len(self.tasks.scores) > 1:
            for name, average in self.tasks.average.items():
                if average is not None:
                    yield Measure(f"average of the tasks, {name}", average, None, lower_is_better=False)

    def _written(self) -> Iterator[Measure]:
        for name, rate in self.humaneval.rates.items() if self.humaneval else []:
            yield Measure(f"HumanEval, {name}", rate.value, rate.standard_error, lower_is_better=False)


def read_measures(folder: Path) -> Measures | None:
    """None where nothing has been measured. Raises CheckpointError for a file that is not as it is written."""
    file = folder / QUALITY
    if not file.exists():
        return None
    try:
        return Measures.model_validate(read_json(file))
    except ValidationError as error:
        raise CheckpointError(f"{file} is damaged: {first_fault(error)}. Delete it and measure again.") from error
