"""How far a step goes: for everything alike, or for each tensor by its size, and how that changes over the steps."""

import math
from dataclasses import dataclass

from torch import Tensor

from compress.tuning.settings import What

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
