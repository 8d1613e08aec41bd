"""Statistics of calibration activations, as needs that a stage declares.

A need is a small frozen value: equal needs of two stages are gathered once. Everything is a mean per token, accumulated
in float64.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor


@dataclass(frozen=True)
class SecondMoment:
    """C = mean over tokens of x x^T at a point of the stream, float64.

    signal: `stream` is the stream itself, before the next norm, as SliceGPT's code has it; `normed` is the stream over
        its root mean square, as the paper has it (equation 8: X is the output of the norm). A few tokens of
        enormous norm weigh heavily in the first and like all others in the second.
    """

    signal: Literal["stream", "normed"]

    def accumulator(self, width: int, eps: float, device: torch.device) -> "MomentAccumulator":
        return MomentAccumulator(self.signal == "normed", width, eps, device)


class MomentAccumulator:
    def __init__(self, normalise: bool, width: int, eps: float, device: torch.device) -> None:
        self.normalise = normalise
        self.eps = eps
        self.sum = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, x: Float[Tensor, "*batch D"]) -> None:
        rows = x.reshape(-1, x.shape[-1]).double()
        if self.normalise:
            rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + self.eps)
        self.sum.addmm_(rows.T, rows)
        self.tokens += len(rows)

    def value(self) -> Float64[Tensor, "D D"]:
        return self.sum / self.tokens
