"""What is asked for: which text, how long, how fast, toward what.

How far a step goes is a rate for everything alike, or for each tensor by its size (`Rate`).
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from compress.checkpoints.output_folder import Output
from compress.models.hub import ModelSource

What = Literal["lora", "factors", "adapters", "all"]
Distill = Literal["none", "logits"]
NUM_HELD_OUT = 64  # windows of the training text, and as many of another
LOOKED_AT = 8  # a look takes no more windows than one in so many that were trained on since the last one
FEWEST_LOOKED_AT = 16


@dataclass(frozen=True, kw_only=True)
class Settings:
    """
    distill: toward the text alone, or the dense model's distribution over next tokens.
    data: the text's name, or a file. steps, tokens, epochs: how long, one of the three. seq_len: tokens a window.
    batch_size: windows a step, of all processes together. train: None for what suits the checkpoint (`structure.py`).
    lora_rank, lora_alpha: of LoRA, whose product is multiplied by alpha / rank; alpha is the rank by default.
    lr: the learning rate at its highest, for everything alike; None for what suits it (`rates.py`).
    warmup: the share of the steps in which it gets there. merge: None for yes, where the result keeps its form.
    eval_every: steps from one look at the held-out windows to the next. patience: looks without a better one.
    """

    data: str
    steps: int | None = None
    tokens: int | None = None
    epochs: float | None = None
    seq_len: int
    batch_size: int = 16
    train: What | None = None
    lora_rank: int = 32
    lora_alpha: int | None = None
    lr: float | None = None
    warmup: float = 0.05
    distill: Distill = "logits"
    merge: bool | None = None
    eval_every: int = 50
    patience: int = 5
    gradient_checkpointing: bool = False
    seed: int = 42

    @property
    def alpha(self) -> int:
        return self.lora_rank if self.lora_alpha is None else self.lora_alpha

    def num_steps(self, available: int) -> int:
        """
        available: windows of the text.
        """
        if self.steps is not None:
            return self.steps
        if self.tokens is not None:
            return max(1, round(self.tokens / (self.batch_size * self.seq_len)))
        assert self.epochs is not None
        return max(1, round(self.epochs * available / self.batch_size))

    @property
    def num_windows(self) -> int | None:
        """As many as are read once; None for all that the text has."""
        return None if self.epochs is not None else self.num_steps(0) * self.batch_size

    def num_looked_at(self, held_out: int) -> int:
        """How many of the windows held out a look is at. A window of it costs about half of one that is trained on."""
        return min(held_out, max(FEWEST_LOOKED_AT, self.eval_every * self.batch_size // LOOKED_AT))


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

    def plain_settings(self) -> dict[str, Any]:
        return dict(vars(self.settings))


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
        return self.highest * scale_of(parameter) if self.relative else self.highest

    def __str__(self) -> str:
        return f"{self.highest:g}" + (" of each tensor's root mean square" if self.relative else "")


# For models of some million parameters. Papers take 2e-4 (SliceGPT) and 5e-5 (SLiM) for billions, for everything alike.
RATES: dict[What, Rate] = {
    "lora": Rate(3e-3, relative=False),
    "factors": Rate(3e-3, relative=True),
    "adapters": Rate(3e-2, relative=True),
    "all": Rate(3e-3, relative=True),
}


def chosen_rate(asked: float | None, what: What) -> Rate:
    """What a user says is for everything alike."""
    return RATES[what] if asked is None else Rate(asked, relative=False)


def scale_of(parameter: Tensor) -> float:
    return max(LEAST, float(parameter.detach().double().square().mean().sqrt()))


def share_of_rate(step: int, steps: int, warmup: float) -> float:
    """Of the highest rate, at a step counted from 0: a straight rise, then a half cosine down to nearly 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising + 1) / (steps - rising + 1)))
