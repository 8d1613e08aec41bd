"""Ridge regression from second moments, regularized toward a known matrix.

    min over W of  E ||u W - t||^2 + damping * mean(diag G) * ||W - W0||^2        G = E u u^T, B = E u t^T

The solution W0 + (G + damping * mean(diag G) I)^-1 (B - G W0) is W0 where the inputs say nothing and least squares
where they say much; if t = u W0 it is W0 for every damping. All in float64.

Dimensions: k inputs, m outputs. W is (k, m): inputs times W, the transpose of a linear layer's weight.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from compress.errors import NumericalError

Matrix = Float64[Tensor, "k m"]
Moment = Float64[Tensor, "k k"]
Metric = Float64[Tensor, "m m"]

DAMPINGS = (1e-2, 1e-1, 1.0)  # that are always tried
RANGE = (1e-4, 10.0)  # of all: from almost plain least squares to almost W0

# Of the targets' mean square: a gain below that is rounding. Where the prefix is still the dense one, all gains are.
NOTHING = 1e-10


@dataclass(frozen=True)
class NormalEquations:
    """Sums over tokens: G = sum of u u^T, B = sum of u t^T. `tokens` is the sum of their weights."""

    G: Moment
    B: Matrix
    tokens: float

    def only(self, inputs: Tensor) -> "NormalEquations":
        """Restrict the equations to some of the inputs, by index."""
        return NormalEquations(self.G[inputs[:, None], inputs], self.B[inputs], self.tokens)

    def less(self, W0: Matrix) -> "NormalEquations":
        """The equations of W - W0, whose targets are t - u W0."""
        return NormalEquations(self.G, torch.addmm(self.B, self.G, W0, alpha=-1), self.tokens)


@dataclass(frozen=True)
class Ridge:
    """The solution W of the formula above for one damping."""

    damping: float
    W: Matrix


def damped(G: Moment, damping: float) -> Moment:
    """G + damping * mean(diag G) I."""
    G = G.clone()
    G.diagonal().add_(damping * G.diagonal().mean())
    return G


def ridge(equations: NormalEquations, W0: Matrix, damping: float, *, name: str) -> Matrix:
    """The W of the formula above. Raises NumericalError, with `name`, where G is not positive definite."""
    return W0 + _change(equations.less(W0), damping, name=name)


def _change(equations: NormalEquations, damping: float, *, name: str) -> Matrix:
    """Solve for W - W0."""
    return torch.cholesky_solve(equations.B, cholesky(damped(equations.G, damping), name=name))


def cholesky(G: Moment, *, name: str) -> Moment:
    factor, failed = torch.linalg.cholesky_ex(G)
    if failed.any() or not torch.isfinite(factor).all():
        raise NumericalError(
            f"The second moment of the inputs of {name} has no Cholesky factor: a NaN, an Inf or inputs that are all "
            "zero. Check the weights before it, or calibrate on more text."
        )
    return factor


def excess(equations: NormalEquations, W: Matrix, metric: Metric | None = None) -> float:
    """The mean of ||(u W - t) S||^2 over tokens, S S^T = metric, less what no W changes: the mean of ||t S||^2."""
    slope = torch.addmm(equations.B, equations.G, W, beta=-2)
    return _inner(W, slope, metric) / equations.tokens


def _inner(A: Matrix, B: Matrix, metric: Metric | None) -> float:
    """tr A^T B metric."""
    return float((A * (B if metric is None else B @ metric)).sum())


def choose_damping(
    fit: NormalEquations, held_out: NormalEquations, W0: Matrix, *, name: str, metric: Metric | None = None
) -> Ridge | None:
    """Choose among up to four dampings the solution on `fit` that is best on `held_out`; None if W0 is no worse."""
    fit, rest = fit.less(W0), held_out.less(W0)
    errors: dict[float, float] = {}  # less that of W0
    best: Ridge | None = None
    while damping := next_damping(errors):
        change = _change(fit, damping, name=name)
        errors[damping] = excess(rest, change, metric)
        if not math.isfinite(errors[damping]):
            raise NumericalError(
                f"What {name} are given or are to give has a NaN or Inf. Check the weights before it and the text."
            )
        if errors[damping] == min(errors.values()):
            best = Ridge(damping, W0 + change)
    unfitted = -_inner(W0, rest.B + held_out.B, metric) / held_out.tokens  # excess(held_out, W0)
    return best if min(errors.values()) < -NOTHING * abs(unfitted) else None


def next_damping(errors: Mapping[float, float]) -> float | None:
    """The next damping to try, from the held-out errors of those before; None to stop.

    First DAMPINGS, then the vertex of the parabola through their errors by log10 of the damping, or, where it opens
    downwards, a decade beyond its lower end. To two digits, lest rounding of the errors show.
    """
    if len(errors) < len(DAMPINGS):
        return DAMPINGS[len(errors)]
    if len(errors) > len(DAMPINGS):
        return None
    low, middle, high = (errors[damping] for damping in DAMPINGS)
    slope, curvature = (high - low) / 2, low - 2 * middle + high  # DAMPINGS are a decade apart
    decades = -slope / curvature if curvature > 0 else math.copysign(2, -slope)
    exponent = math.log10(DAMPINGS[1]) + decades
    damping = float(f"{10 ** min(max(exponent, math.log10(RANGE[0])), math.log10(RANGE[1])):.2g}")
    return None if damping in errors else damping
