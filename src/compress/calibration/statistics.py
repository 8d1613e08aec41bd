"""Statistics of the calibration activations, summed in float64 over tokens, batches and processes.

At points of the stream stages declare what they need, by small frozen values: what two of them need is gathered once,
and the walk keeps the dense model's activations only if one of them asks. Of linears two second moments are gathered,
u u^T of the inputs and u t^T with their targets.

A linear with k inputs that was given n < k tokens, as experts may be, counts as if it had been given k - n more, which
its weights map as they do now: for readers such as all tokens of the branch are, for writers white ones as strong as
those that came (or of variance 1 where none came). Nothing is changed at n = k; at n = 0 readers go by all tokens, and
writers by their weights alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from compress.calibration.processes import Processes
from compress.numerics.functional import rms_normed
from compress.numerics.moments import InputMoments, normal_moments
from compress.numerics.ridge import NormalEquations
from compress.numerics.sums import TOKENS_AT_ONCE, GramSum, add_product, at_least_float32


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


@dataclass(frozen=True)
class RelativeError:
    """sum ||x - x_dense||^2 / sum ||x_dense||^2 over all tokens, x the stream of the compressed prefix."""

    dense: ClassVar = True


Need = SecondMoment | RelativeError


class PointStatistics:
    """What stages need at one point of the stream; empty where they need nothing."""

    def __init__(self, needs: Iterable[Need], width: int, eps: float, device: torch.device) -> None:
        self.needs, self.eps = list(needs), eps
        self.grams = {need: GramSum(width, device) for need in self.needs if isinstance(need, SecondMoment)}
        self.tokens, self.error, self.energy = torch.zeros(3, dtype=torch.float64, device=device)

    def __bool__(self) -> bool:
        return bool(self.needs)

    def add(self, stream: Float[Tensor, "*batch D"], dense: Float[Tensor, "*batch D"] | None) -> None:
        """Take in a batch: the stream of the compressed prefix in the dense basis, and the dense model's."""
        self.tokens += len(rows(stream))
        for need, gram in self.grams.items():
            signal = dense if need.dense else stream
            assert signal is not None
            x = at_least_float32(rows(signal))
            gram.add(rms_normed(x, x.shape[-1], self.eps) if need.signal == "normed" else x)
        if RelativeError() in self.needs:
            assert dense is not None
            self.error += (stream - dense).square().sum()
            self.energy += dense.square().sum()

    def close(self, processes: Processes) -> dict[Need, Tensor]:
        if not self.needs:
            return {}
        processes.add_up(*(gram.total for gram in self.grams.values()), self.tokens, self.error, self.energy)
        found: dict[Need, Tensor] = {need: gram.close() / self.tokens for need, gram in self.grams.items()}
        return found | ({RelativeError(): self.error / self.energy} if RelativeError() in self.needs else {})


@dataclass(frozen=True)
class InputSums:
    """Sums of u and of |u| over all windows."""

    total: Float64[Tensor, "k"]
    absolute: Float64[Tensor, "k"]

    def only(self, inputs: Tensor) -> "InputSums":
        return InputSums(self.total[inputs], self.absolute[inputs])

    def moments(self, fit: NormalEquations) -> InputMoments:
        """Means over the tokens of `fit`; the second moment takes the place of its G."""
        return InputMoments(fit.G.div_(fit.tokens), self.total / fit.tokens, self.absolute / fit.tokens)


class EquationSums:
    """Sums of u u^T and u t^T, separate for the windows to fit on and the held-out ones; of u and |u| over all.

    Each of them is asked for once, in all processes, when everything is added.

    fitted, seen: how many tokens there were in this process, of the windows to fit on and of all.
    """

    def __init__(self, inputs: int, targets: int, device: torch.device) -> None:
        self._shape, self._device = (inputs, targets), device
        self._sums: dict[bool, tuple[GramSum, Tensor, Tensor]] = {}
        self._total, self._absolute = torch.zeros(2, inputs, dtype=torch.float64, device=device)
        self.fitted = self.seen = 0

    def _of(self, *, held_out: bool) -> tuple[GramSum, Tensor, Tensor]:
        """The sums and the tokens' weights, allocated on first use: the held-out ones are as large as the others."""
        if held_out not in self._sums:
            B, tokens = (torch.zeros(size, dtype=torch.float64, device=self._device) for size in (self._shape, ()))
            self._sums[held_out] = GramSum(self._shape[0], self._device), B, tokens
        return self._sums[held_out]

    def add(
        self,
        u: Float[Tensor, "tokens k"],
        t: Float[Tensor, "tokens m"] | None = None,
        *,
        weights: Float[Tensor, "tokens 1"] | None = None,
        held_out: bool = False,
    ) -> None:
        """Add a batch, weighted by token: as if u and t were multiplied by the weight's square root."""
        self.seen += len(u)
        self.fitted += 0 if held_out else len(u)
        G, B, tokens = self._of(held_out=held_out)
        u = at_least_float32(u)
        t = u[:, :0] if t is None else t.to(u.dtype)
        roots = u.new_ones(len(u), 1) if weights is None else weights.to(u.dtype).sqrt()
        for inputs, targets, root in zip(*(x.split(TOKENS_AT_ONCE) for x in (u, t, roots)), strict=True):
            if weights is not None:
                inputs, targets = inputs * root, targets * root
            self._total += (root.T @ inputs)[0]
            self._absolute += (root.T @ inputs.abs())[0]
            G.add(inputs)
            add_product(B, inputs, targets)
            tokens += root.square().sum()

    def equations(self, processes: Processes, *, held_out: bool = False) -> NormalEquations:
        G, B, tokens = self._of(held_out=held_out)
        processes.add_up(G.total, B, tokens)
        return NormalEquations(G.close(), B, float(tokens))

    def inputs(self, processes: Processes) -> InputSums:
        processes.add_up(self._total, self._absolute)
        return InputSums(self._total, self._absolute)

    def close(self, processes: Processes) -> tuple[NormalEquations, NormalEquations, InputSums]:
        return self.equations(processes), self.equations(processes, held_out=True), self.inputs(processes)

    def moments(self, processes: Processes) -> InputMoments:
        """Moments of the inputs over the windows to fit on."""
        return self.inputs(processes).moments(self.equations(processes))


@dataclass(frozen=True)
class Regularized:
    """A linear's inputs over all processes, with the pseudo-tokens added. tokens: how many real ones there were."""

    fit: NormalEquations
    inputs: InputSums
    tokens: int

    def moments(self) -> InputMoments:
        return self.inputs.moments(self.fit)


def regularized(
    sums: EquationSums,
    processes: Processes,
    like: InputMoments | None = None,
    matrix: Float64[Tensor, "k m"] | None = None,
) -> Regularized:
    """Add pseudo-tokens to a linear that was given fewer tokens than its k inputs, so that there are k.

    like: what their inputs are; by default white. matrix: what is made of them, where there are targets.
    """
    fit, inputs = sums.equations(processes), sums.inputs(processes)
    given, seen = int(processes.total(sums.fitted)), int(processes.total(sums.seen))
    width = len(fit.G)
    if given >= width:
        return Regularized(fit, inputs, seen)
    weight = (width - given) * (fit.tokens / given if given else 1.0)
    like = white(fit) if like is None else like
    G = weight * like.second
    B = fit.B if matrix is None else fit.B + G @ matrix
    filled = InputSums(inputs.total + weight * like.mean, inputs.absolute + weight * like.mean_abs)
    return Regularized(NormalEquations(fit.G + G, B, fit.tokens + weight), filled, seen)


def white(fit: NormalEquations) -> InputMoments:
    """Moments of isotropic inputs with the power of the real ones."""
    variance = float(fit.G.diagonal().mean() / fit.tokens) if fit.tokens else 1.0
    second = torch.eye(len(fit.G), dtype=fit.G.dtype, device=fit.G.device) * (variance or 1.0)
    return normal_moments(second, second.new_zeros(len(second)))


def rows(stream: Float[Tensor, "*tokens d"]) -> Float[Tensor, "_ d"]:
    return stream.reshape(-1, stream.shape[-1])
