"""What is asked for: which text, how long, how fast, toward what; and the windows of the text.

How far a step goes is a rate for everything alike, or for each tensor by its size (`Rate`). There are windows to train
on, windows held out, and windows of another text, to see what else the training does. Of a data set they come from its
train split and its validation split, never from its test split; a file's last windows are held out.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Int64
from pydantic import Field, ValidationError, model_validator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compress.checkpoints.output_folder import Output
from compress.datasets import SEPARATOR, load_rows
from compress.datasets._sources import is_file
from compress.datasets.windows import CHARACTERS_PER_TOKEN, Text, cut, encode, sample, too_little_text
from compress.errors import CompressError, report
from compress.models.hub import ModelSource
from compress.recipe import described, dotted
from compress.stages._stage import Strict

What = Literal["lora", "factors", "adapters", "all"]
Count = Annotated[int, Field(ge=1)]
STEPS = 400  # where nothing says how long
NUM_HELD_OUT = 64  # windows of the training text, and as many of another
LOOKED_AT = 8  # a look takes no more windows than one in so many that were trained on since the last one
FEWEST_LOOKED_AT = 16
FILE_SHARE = 10  # of a file's windows one in so many is held out, at most
Windows = Int64[Tensor, "_ seq_len"]


class Settings(Strict):
    """How a checkpoint is tuned.

    distill: toward the text alone, or the dense model's distribution over next tokens.
    data: the text's name, or a file. steps, tokens, epochs: how long, one of the three. seq_len: tokens a window.
    batch_size: windows a step, of all processes together. train: None for what suits the checkpoint (`trainable`).
    lora_rank, lora_alpha: of LoRA, whose product is multiplied by alpha / rank; alpha is the rank by default.
    lr: the learning rate at its highest, for everything alike; None for what suits it (`RATES`).
    warmup: the share of the steps in which it gets there. merge: None for yes, where the result keeps its form.
    eval_every: steps from one look at the held-out windows to the next. patience: looks without a better one.
    """

    data: str
    steps: Count | None = None
    tokens: Count | None = None
    epochs: Annotated[float, Field(ge=0.001)] | None = None
    seq_len: Annotated[int, Field(ge=2)]
    batch_size: Count = 16
    train: What | None = None
    lora_rank: Count = 32
    lora_alpha: Count | None = None
    lr: Annotated[float, Field(gt=0, lt=1)] | None = None
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.05
    distill: Literal["none", "logits"] = "logits"
    merge: bool | None = None
    eval_every: Count = 50
    patience: Count = 5
    gradient_checkpointing: bool = False
    seed: Annotated[int, Field(ge=0)] = 42

    @model_validator(mode="after")
    def _one_length(self) -> "Settings":
        lengths = [name for name in ("steps", "tokens", "epochs") if getattr(self, name) is not None]
        if len(lengths) > 1:
            raise ValueError(f"{' and '.join(lengths)} all say how long. Use one of them.")
        return self

    @property
    def alpha(self) -> int:
        return self.lora_alpha or self.lora_rank

    def num_steps(self, available: int) -> int:
        """Count the optimizer's steps. available: windows of the text."""
        if self.tokens is not None:
            return max(1, round(self.tokens / (self.batch_size * self.seq_len)))
        if self.epochs is not None:
            return max(1, round(self.epochs * available / self.batch_size))
        return self.steps or STEPS

    @property
    def num_windows(self) -> int | None:
        """As many as are read once; None for all that the text has."""
        return None if self.epochs is not None else self.num_steps(0) * self.batch_size

    def num_looked_at(self, held_out: int) -> int:
        """How many of the windows held out a look is at. A window of it costs about half of one that is trained on."""
        return min(held_out, max(FEWEST_LOOKED_AT, self.eval_every * self.batch_size // LOOKED_AT))


def parse_settings(values: Mapping[str, Any], flags: Mapping[str, str]) -> Settings:
    """Raises UsageError with every problem. flags: what was typed for a value, by its field."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        found = [(dotted(where), what) for where, what in described(error, Settings)]
        report([f"{flags.get(where, where)}: {what}" if where else what for where, what in found])
        raise


@dataclass(frozen=True, kw_only=True)
class TuningJob(Output):
    """A compressed checkpoint, how it is tuned, and where the result goes.

    model: the compressed checkpoint. teacher: the dense model, None where nothing is distilled from it.
    command: how a user would ask for it again; it goes into the model card. dtype: what is frozen is held in it; None
        for float32 on the CPU, elsewhere the checkpoint's own.
    """

    settings: Settings
    teacher: ModelSource | None
    command: str
    dtype: torch.dtype | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    data_dir: Path | None = None

    @property
    def folder(self) -> Path:
        assert self.model.folder is not None
        return self.model.folder


LEAST = 1e-3  # of a tensor's root mean square: biases may start as zeros


@dataclass(frozen=True)
class Rate:
    """Adam's at its highest.

    relative: it is a share of each tensor's root mean square before training. One rate then does for factors and gains
    of a few thousandths and of several units; a LoRA, one of whose factors starts as zeros, has no such size.
    """

    highest: float
    relative: bool

    def of(self, parameter: Tensor) -> float:
        size = float(parameter.detach().double().square().mean().sqrt()) if self.relative else 1.0
        return self.highest * max(LEAST, size)

    def __str__(self) -> str:
        return f"{self.highest:g}" + (" of each tensor's root mean square" if self.relative else "")


# For models of some million parameters. Papers take 2e-4 (SliceGPT) and 5e-5 (SLiM) for billions, for everything alike.
RATES: dict[What, Rate] = {
    "lora": Rate(3e-3, relative=False),
    "factors": Rate(3e-3, relative=True),
    "adapters": Rate(3e-2, relative=True),
    "all": Rate(3e-3, relative=True),
}


def share_of_rate(step: int, steps: int, warmup: float) -> float:
    """Of the highest rate, at a step counted from 0: a straight rise, then a half cosine down to nearly 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising + 1) / (steps - rising + 1)))


# The text.


@dataclass(frozen=True)
class Texts:
    """Windows of texts. unlike: those of a text of another kind, by its name; None where none is on this machine."""

    train: Windows
    held_out: Windows
    unlike: tuple[str, Windows] | None


@dataclass(frozen=True)
class Reader:
    """How texts become windows."""

    tokenizer: PreTrainedTokenizerBase
    seq_len: int
    seed: int
    data_dir: Path | None

    def texts(self, source: str, count: int | None, others: Iterable[str]) -> Texts:
        """Cut the windows. count: to train on, None for all. others: texts that may be another kind, the best first."""
        if is_file(source):
            train, held_out = self.of_file(source, count)
        else:
            train, held_out = self.drawn(source, "train", count), self.drawn(source, "validation", NUM_HELD_OUT)
        return Texts(train, held_out, self.unlike(source, others))

    def of_file(self, source: str, count: int | None) -> tuple[Windows, Windows]:
        windows = self.all_of(load_rows(source, "train", self.data_dir))
        if len(windows) < 2:
            raise too_little_text(source, len(windows), 2, self.seq_len)
        held_out = min(NUM_HELD_OUT, max(1, len(windows) // FILE_SHARE))
        return windows[:-held_out][:count], windows[-held_out:]

    def drawn(self, source: str, split: str, count: int | None) -> Windows:
        """From random places of a long text; all windows of one that is hardly longer than what is wanted."""
        rows = load_rows(source, split, self.data_dir)
        text = Text(source, rows)
        if count is not None and text.length >= CHARACTERS_PER_TOKEN * count * self.seq_len:
            return sample(text, self.tokenizer, count, self.seq_len, self.seed)
        windows = self.all_of(rows)
        if not len(windows):
            raise too_little_text(source, 0, 1, self.seq_len)
        return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(self.seed))][:count]

    def all_of(self, rows: list[str]) -> Windows:
        return cut(encode(self.tokenizer, SEPARATOR.join(rows)), self.seq_len)

    def unlike(self, source: str, others: Iterable[str]) -> tuple[str, Windows] | None:
        for other in others:
            if other == source:
                continue
            try:
                if is_file(other):
                    return other, self.of_file(other, 1)[1]
                return other, self.drawn(other, "validation", NUM_HELD_OUT)
            except CompressError:
                continue  # not on this machine, or too short: the next one will do
        return None


def batch(windows: Windows, step: int, size: int, seed: int) -> Windows:
    """The windows of a step: the text over and over, in another order every time."""
    numbers = range(step * size, (step + 1) * size)
    orders = {
        epoch: torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed + epoch))
        for epoch in {number // len(windows) for number in numbers}
    }
    return windows[[int(orders[number // len(windows)][number % len(windows)]) for number in numbers]]
