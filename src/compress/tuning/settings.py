"""What is asked for: which text, how long, how fast, toward what.

How far a step goes is a rate for everything alike, or for each tensor by its size (`Rate`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from compress.checkpoints.output_folder import Output
from compress.errors import report
from compress.models.hub import ModelSource
from compress.recipe import described

What = Literal["lora", "factors", "adapters", "all"]
Count = Annotated[int, Field(ge=1)]
STEPS = 400  # where nothing says how long
NUM_HELD_OUT = 64  # windows of the training text, and as many of another
LOOKED_AT = 8  # a look takes no more windows than one in so many that were trained on since the last one
FEWEST_LOOKED_AT = 16


class Settings(BaseModel):
    """
    distill: toward the text alone, or the dense model's distribution over next tokens.
    data: the text's name, or a file. steps, tokens, epochs: how long, one of the three. seq_len: tokens a window.
    batch_size: windows a step, of all processes together. train: None for what suits the checkpoint (`trainable`).
    lora_rank, lora_alpha: of LoRA, whose product is multiplied by alpha / rank; alpha is the rank by default.
    lr: the learning rate at its highest, for everything alike; None for what suits it (`RATES`).
    warmup: the share of the steps in which it gets there. merge: None for yes, where the result keeps its form.
    eval_every: steps from one look at the held-out windows to the next. patience: looks without a better one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
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
        """
        available: windows of the text.
        """
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
        found = [(".".join(map(str, each.where)), each.what) for each in described(error, Settings)]
        report([f"{flags.get(where, where)}: {what}" if where else what for where, what in found])
        raise


@dataclass(frozen=True, kw_only=True)
class TuningJob(Output):
    """
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
