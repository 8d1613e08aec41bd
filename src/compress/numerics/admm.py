"""A sparse and a low-rank matrix that together stand for a third: 3BASiL's three-block ADMM (NeurIPS 2025).

    min over S, L   ||(W - S - L) X||^2    S within a pattern, rank L <= r

Mask, weights and low rank settle together. With inputs scaled so that G = E x x^T has a unit diagonal, and D the copy
of S that keeps to the pattern:

    S <- ((W - L) G + rho D - V) (G + rho I)^-1     by G's eigenvectors, found once
    D <- the pattern's best of S + V / rho
    L <- the best rank r of W - S, an error measured by G
    V <- V + rho (S - D),   rho grows, the less of the mask still moves the less

Two things are ours: all but D and V is kept by G's eigenvectors, so that an iteration takes two products of whole
matrices, and L is refitted by a step of subspace iteration from its last directions instead of a decomposition.

Dimensions: W (m, n), m outputs, n inputs, r the rank. In G's eigenvectors a matrix is written with an e: Se = S Q.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from compress.numerics.hessian import Hessian
from compress.numerics.sparsity import Pattern, keep_mask

RHO = 0.1  # of the unit diagonal
LOOK = 3  # iterations from one look at how much of the mask has moved to the next
# What rho is multiplied by then: above each share of the kept weights that has moved. 3BASiL's own range is 1.02-1.1.
GROWTH = ((0.1, 1.1), (0.005, 1.05), (-1.0, 1.02))


@dataclass(frozen=True)
class Split:
    """W is about S + L: S within the mask, L of the rank asked for."""

    S: Float[Tensor, "m n"]
    mask: Bool[Tensor, "m n"]
    L: Float[Tensor, "m n"]


def sparse_plus_lowrank(
    W: Float[Tensor, "m n"], hessian: Hessian, pattern: Pattern, rank: int, *, iterations: int
) -> Split:
    scale, values, Q = (tensor.to(W.dtype) for tensor in (hessian.scale, *hessian.scaled_eigen))
    T = W * scale
    Te, mask = T @ Q, keep_mask(T.abs(), pattern)
    D, V, Le = T * mask, torch.zeros_like(T), torch.zeros_like(T)
    directions, rho, looked = None, RHO, mask
    for iteration in range(1, iterations + 1):
        Se = ((Te - Le) * values + (rho * D - V) @ Q) / (values + rho)
        S = Se @ Q.T
        wanted = S + V / rho
        mask = keep_mask(wanted.abs(), pattern)
        D = wanted * mask
        V = V + rho * (S - D)
        if rank:
            missed = Te - Se
            directions = top_outputs(missed, values, rank, directions)
            Le = directions @ (directions.T @ missed)
        if iteration % LOOK == 0:
            moved = float((mask & ~looked).sum() / mask.sum())
            rho *= next(factor for share, factor in GROWTH if moved > share)
            looked = mask
    return Split(D / scale, mask, Le @ Q.T / scale)


def top_outputs(
    M: Float[Tensor, "m n"], values: Float[Tensor, "n"], rank: int, start: Float[Tensor, "m r"] | None
) -> Float[Tensor, "m r"]:
    """Nearly the first left singular vectors of M diag(values)^(1/2)."""
    weighed = M * values
    if start is None:
        _, U = torch.linalg.eigh((weighed @ M.T).double())
        return U[:, -rank:].to(M.dtype)
    return torch.linalg.qr(weighed @ (M.T @ start)).Q
