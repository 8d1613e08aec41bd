"""Least squares from second moments, drawn towards a matrix that is known to be good.

    min over W of  E ||u W - t||^2 + damping * mean(diag G) * ||W - W0||^2        G = E u u^T, B = E u t^T

The solution W0 + (G + damping * mean(diag G) I)^-1 (B - G W0) is W0 where the inputs say nothing and least squares
where they say much; if t = u W0 it is W0 for every damping. All in float64.

Dimensions: k inputs, m outputs. W is (k, m): inputs times W, the transpose of a linear layer's weight.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from compress.errors import NumericalError

# From almost plain least squares to almost W0.
DAMPINGS = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0)

# Of the targets' mean square: a gain below that is rounding. Where the prefix is still the dense one, all gains are.
NOTHING = 1e-10


@dataclass(frozen=True)
class NormalEquations:
    """Sums over tokens: G = sum of u u^T, B = sum of u t^T. `tokens` is the sum of their weights."""

    G: Float64[Tensor, "k k"]
    B: Float64[Tensor, "k m"]
    tokens: float

    def only(self, inputs: Tensor) -> "NormalEquations":
        """The equations of some of the inputs, by their indices."""
        return NormalEquations(self.G[inputs][:, inputs], self.B[inputs], self.tokens)


def damped(G: Float64[Tensor, "k k"], damping: float) -> Float64[Tensor, "k k"]:
    """G + damping * mean(diag G) I."""
    ridge = damping * G.diagonal().mean()
    return G + ridge * torch.eye(len(G), dtype=G.dtype, device=G.device)


def ridge(
    equations: NormalEquations, W0: Float64[Tensor, "k m"], damping: float, *, name: str
) -> Float64[Tensor, "k m"]:
    """The W of the formula above. Raises NumericalError, with `name`, where G is not positive definite."""
    residual = equations.B - equations.G @ W0
    return W0 + torch.cholesky_solve(residual, cholesky(damped(equations.G, damping), name=name))


def cholesky(G: Float64[Tensor, "k k"], *, name: str) -> Float64[Tensor, "k k"]:
    factor, failed = torch.linalg.cholesky_ex(G)
    if failed.any() or not torch.isfinite(factor).all():
        raise NumericalError(
            f"The second moment of the inputs of {name} has no Cholesky factor: a NaN, an Inf or inputs that are all "
            "zero. Check the weights before it, or calibrate on more text."
        )
    return factor


def excess(
    equations: NormalEquations, W: Float64[Tensor, "k m"], metric: Float64[Tensor, "m m"] | None = None
) -> float:
    """The mean of ||(u W - t) S||^2 over tokens, S S^T = metric, less what no W changes: the mean of ||t S||^2."""
    slope = equations.G @ W - 2 * equations.B
    return float((W * (slope if metric is None else slope @ metric)).sum() / equations.tokens)


def choose_damping(
    fit: NormalEquations,
    held_out: NormalEquations,
    W0: Float64[Tensor, "k m"],
    *,
    name: str,
    metric: Float64[Tensor, "m m"] | None = None,
    dampings: Sequence[float] = DAMPINGS,
) -> float | None:
    """The damping whose solution on `fit` is best on `held_out`; None if W0 itself is no worse there, to rounding."""
    errors = {damping: excess(held_out, ridge(fit, W0, damping, name=name), metric) for damping in dampings}
    unfitted = excess(held_out, W0, metric)
    if not all(map(math.isfinite, (unfitted, *errors.values()))):
        raise NumericalError(
            f"What {name} are given or are to give has a NaN or Inf. Check the weights before it and the text."
        )
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] < unfitted - NOTHING * abs(unfitted) else None
