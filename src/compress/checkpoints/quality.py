"""quality.json beside a checkpoint: what `compress eval`, `bench` and `report` with `--save` have measured of it.

The measures of `evaluation` return these classes; the model card, the report and the plots read them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

from pydantic import Field

from compress.checkpoints.files import write_json
from compress.checkpoints.metadata import Positive, Record, validated
from compress.errors import OutputError
from compress.io import atomic_write, exclusive
from compress.models.untrusted import read_json

QUALITY = "quality.json"
Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
LOWER_IS_BETTER = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")  # of a task's metrics


@dataclass(frozen=True)
class Measure:
    """One number of quality.json, as tables, card and plots show it.

    name: what was measured, and on what. unit: None for a number without. error: the standard error, where it is known.
    sample: how much was measured.
    """

    name: str
    value: float
    error: float | None
    unit: str | None = None
    lower_is_better: bool = True
    sample: str = ""

    @property
    def text(self) -> str:
        unit = "" if self.unit is None else f" {self.unit}"
        return f"{self.value:.4g}" + ("" if self.error is None else f" ± {self.error:.2g}") + unit

    @property
    def text_and_sample(self) -> str:
        return f"{self.text}, {self.sample}" if self.sample else self.text


class OnText(Record):
    """What was measured on the windows of a text.

    tokens: those that were predicted. seconds: that it took.
    standard_error: of the mean over windows; None for one window.
    """

    dataset: str
    standard_error: NotNegative | None
    tokens: int
    windows: int
    seq_len: int
    seconds: NotNegative

    @property
    def where(self) -> str:
        """The text, a file by its name alone."""
        return f"{PurePath(self.dataset).name}, windows of {self.seq_len}"

    @property
    def sample(self) -> str:
        return f"{self.windows:,} windows"


class Perplexity(OnText):
    """Perplexity on a text. nll: the mean loss in nats per token."""

    ppl: NotNegative
    nll: float


class Divergence(OnText):
    """KL divergence on a text. kl: nats per token, from the model `dense`. agreement: share of equal likeliest ones."""

    dense: str
    kl: float
    agreement: Share


class Metric(Record):
    """A task's metric. standard_error: None where it is unknown."""

    value: float
    standard_error: NotNegative | None


class TaskScore(Record):
    """A task's metrics. metrics: by lm-eval's names. source: of the documents, `files` or `hub`."""

    task: str
    source: str
    documents: int
    metrics: dict[str, Metric]


class Tasks(Record):
    scores: list[TaskScore]
    average: dict[str, float | None]


class HumanEval(Record):
    """HumanEval's result. rates: by pass@k. failures: how often programs failed in which way."""

    rates: dict[str, Metric]
    problems: int
    samples: int
    temperature: float
    passed: int
    failures: dict[str, int]

    @property
    def sample(self) -> str:
        how = f"at temperature {self.temperature:g}" if self.temperature else "greedy"
        return f"{self.problems} problems, {self.passed} of {self.problems * self.samples} programs passed, {how}"


class Rate(Record):
    """Tokens a second: the median and the quartiles of rounds."""

    median: NotNegative
    low: NotNegative
    high: NotNegative

    @property
    def text(self) -> str:
        digits = ",.0f" if self.median >= 100 else ",.2f"
        return f"{self.median:{digits}} ± {(self.high - self.low) / 2:{digits}}"


class Speed(Record):
    """Of `batch` sequences, of a prompt and of new tokens after it. machine, dtype: None for llama.cpp.

    dense: the model that was measured in turns with this one, None where this one was alone. prefill, decode: by
    `dense` and `compressed`; empty where there was no room.
    """

    engine: Literal["transformers", "llamacpp"]
    dense: str | None
    batch: Positive
    prompt: Positive
    new: Positive
    rounds: Positive
    dtype: str | None
    machine: str | None
    prefill: dict[Literal["dense", "compressed"], Rate]
    decode: dict[Literal["dense", "compressed"], Rate]


class Continuation(Record):
    prompt: str
    dense: str
    compressed: str


class Continuations(Record):
    """How two models go on with prompts, greedily. dense: the other one's name. tokens: at most as many are new."""

    dense: str
    tokens: Positive
    texts: list[Continuation]


class Quality(Record):
    """Only what was measured is set. settings: by the measure's name, what it depends on beside model and text."""

    perplexity: list[Perplexity] = Field(default_factory=list)
    divergence: list[Divergence] = Field(default_factory=list)
    tasks: Tasks | None = None
    humaneval: HumanEval | None = None
    speed: list[Speed] = Field(default_factory=list)
    continuations: Continuations | None = None
    settings: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @property
    def measures(self) -> list[Measure]:
        return list(self._measures())

    def _measures(self) -> Iterator[Measure]:
        for each in self.perplexity:
            yield Measure(f"perplexity on {each.where}", each.ppl, each.standard_error, sample=each.sample)
        for one in self.divergence:
            name, sample = f"divergence from dense on {one.where}", one.sample
            yield Measure(name, one.kl, one.standard_error, "nats a token", sample=sample)
            name, share = f"same likeliest token as dense on {one.where}", 100 * one.agreement
            yield Measure(name, share, None, "%", lower_is_better=False, sample=sample)
        for score in self.tasks.scores if self.tasks else []:
            sample = f"{score.documents:,} documents from {'files' if score.source == 'files' else 'the hub'}"
            for name, metric in score.metrics.items():
                lower, error = name in LOWER_IS_BETTER, metric.standard_error
                yield Measure(f"{score.task}, {name}", metric.value, error, lower_is_better=lower, sample=sample)
        if self.tasks and len(self.tasks.scores) > 1:
            for name, average in self.tasks.average.items():
                if average is not None:
                    yield Measure(f"average of the tasks, {name}", average, None, lower_is_better=False)
        if self.humaneval:
            sample = self.humaneval.sample
            for name, rate in self.humaneval.rates.items():
                error = rate.standard_error
                yield Measure(f"HumanEval, {name}", rate.value, error, lower_is_better=False, sample=sample)


def read_quality(folder: Path) -> Quality | None:
    """None where nothing has been measured. Raises CheckpointError for a file that is not as it is written."""
    file = folder / QUALITY
    if not file.exists():
        return None
    return validated(Quality, read_json(file), file, "Delete it and measure again.")


def save_quality(folder: Path, measured: Quality) -> Path:
    """Add measures to quality.json, atomically. Those that are in it already are replaced, others stay."""
    file = folder / QUALITY
    try:
        # Another process may be adding measures of its own.
        with exclusive(folder):
            kept = read_quality(folder) or Quality()
            settings = {**kept.settings, **measured.settings}
            with atomic_write(file) as unfinished:
                write_json(unfinished, {**kept.to_dict(), **measured.to_dict(), "settings": settings})
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error.strerror}. Free space or its folder.") from error
    return file
