"""Statistics of calibration activations at points of the stream, declared by stages as needs.

A need is a small frozen value: equal needs of two stages are gathered once, and the walk keeps the dense model's
activations beside the compressed ones only if some need asks for them. Sums are in float64, over batches and processes.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from compress.numerics.norms import rms_normed
from compress.numerics.sums import GramSum, at_least_float32


@runtime_checkable
class Accumulator(Protocol):
    def add(self, stream: Tensor, dense: Tensor | None) -> None:
        """Take in a batch: the stream of the compressed prefix in the dense basis, and the dense model's."""

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """The tensors to sum over processes, in place, before `value` is read."""

    def value(self) -> Tensor: ...


@runtime_checkable
class Need(Protocol):
    """dense: whether the dense model's stream is needed."""

    @property
    def dense(self) -> bool: ...

    def __hash__(self) -> int: ...

    def accumulator(self, width: int, eps: float, device: torch.device) -> Accumulator: ...


@dataclass(frozen=True)
class SecondMoment:
    """C = mean over tokens of x x^T at a point of the stream.

    signal: `stream` is the stream itself, before the next norm, as SliceGPT's code has it; `normed` is the stream over
        its root mean square, as the paper has it (equation 8: X is the output of the norm). A few tokens of
        enormous norm weigh heavily in the first and like all others in the second.
    dense: x is the dense model's stream, not that of the compressed prefix.
    """

    signal: Literal["stream", "normed"]
    dense: bool = False

    def accumulator(self, width: int, eps: float, device: torch.device) -> "MomentAccumulator":
        return MomentAccumulator(self, width, eps, device)


class MomentAccumulator:
    def __init__(self, need: SecondMoment, width: int, eps: float, device: torch.device) -> None:
        self.need = need
        self.eps = eps
        self.gram = GramSum(width, device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)

    @property
    def sums(self) -> tuple[Tensor, ...]:
        return self.gram.total, self.tokens

    def add(self, stream: Float[Tensor, "*batch D"], dense: Float[Tensor, "*batch D"] | None = None) -> None:
        signal = dense if self.need.dense else stream
        if signal is None:
            raise ValueError("This second moment is of the dense stream, which is not there.")
        rows = at_least_float32(signal.reshape(-1, signal.shape[-1]))
        if self.need.signal == "normed":
            rows = rms_normed(rows, rows.shape[-1], self.eps)
        self.gram.add(rows)
        self.tokens += len(rows)

    def value(self) -> Float64[Tensor, "D D"]:
        return self.gram.close() / self.tokens


@dataclass(frozen=True)
class RelativeError:
    """sum ||x - x_dense||^2 / sum ||x_dense||^2 over all tokens, x the stream of the compressed prefix."""

    @property
    def dense(self) -> bool:
        return True

    def accumulator(self, width: int, eps: float, device: torch.device) -> "ErrorAccumulator":
        return ErrorAccumulator(device)


class ErrorAccumulator:
    def __init__(self, device: torch.device) -> None:
        self.error, self.energy = torch.zeros(2, dtype=torch.float64, device=device)

    @property
    def sums(self) -> tuple[Tensor, ...]:
        return self.error, self.energy

    def add(self, stream: Float[Tensor, "*batch D"], dense: Float[Tensor, "*batch D"] | None) -> None:
        if dense is None:
            raise ValueError("RelativeError needs the dense stream.")
        self.error += (stream - dense).square().sum()
        self.energy += dense.square().sum()

    def value(self) -> Float64[Tensor, ""]:
        return self.error / self.energy
