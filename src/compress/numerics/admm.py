"""A sparse and a low-rank matrix whose sum is near a weight: 3BASiL's three-block ADMM (NeurIPS 2025).

    min over S, L   ||(W - S - L) X||^2    S within a pattern, rank L <= r

Mask, weights and low rank are found together. With inputs scaled so that G = E x x^T has a unit diagonal, D the copy of
S that keeps to the pattern, U the scaled dual:

    S <- W - L + rho (D - U - (W - L)) (G + rho I)^-1
    D <- the pattern's best of S + U
    U <- U + S - D
    L <- the best rank r of W - S, an error measured by G

The schedule of rho and the update of L are ours. rho grows from RHO_FIRST to RHO_LAST, or RHO_ALONE without a low rank,
by the same factor every PERIOD iterations: the mask changes much at first and hardly in the end, and the slower rho
grows, the better the mask. (3BASiL raises rho by how much the mask has changed.) What is slow is not the mask but that
S and L take turns, so L moves on from the best of rank r by MOMENTUM times its last change, until three quarters of the
iterations are done: that halves the iterations to the same error. An iteration takes one product of n x n with n x m,
by a matrix that is made anew only when rho changes. L takes one step of subspace iteration from its last directions
instead of a decomposition.

Dimensions: W (m, n), m outputs, n inputs, r the rank. Everything is transposed here, so that the weights that a mask
compares lie in different rows: T, the scaled W, S and L are (n, m).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from compress.numerics.moments import Hessian
from compress.numerics.sparsity import Pattern, free_mask, ranks_in_group

Weight = Float[Tensor, "n m"]
Square = Float[Tensor, "n n"]

RHO_FIRST, RHO_LAST, RHO_ALONE = 0.1, 0.6, 1.0  # in units of G's diagonal
PERIOD = 8  # iterations with the same rho
START_STEPS = 4  # of subspace iteration in the first iteration; one in each of the others
CHUNK = 2**18  # weights that an iteration works on at a time: what is computed from them stays in a core's cache
MOMENTUM = 0.95


@dataclass(frozen=True)
class Split:
    """W is about S + L: S within the mask, L of the rank asked for."""

    S: Float[Tensor, "m n"]
    L: Float[Tensor, "m n"]
    mask: Bool[Tensor, "m n"]


def sparse_plus_lowrank(
    weights: Sequence[Float[Tensor, "_ n"]],
    hessian: Hessian,
    pattern: Pattern,
    ranks: Sequence[int],
    *,
    iterations: int,
) -> list[Split]:
    """Split weights with the same inputs, each with a rank of its own."""
    dtype, rho, growth = weights[0].dtype, RHO_FIRST, (RHO_LAST if any(ranks) else RHO_ALONE) / RHO_FIRST
    scale, (values, Q) = hessian.scale.to(dtype)[:, None], hessian.scaled_eigen(dtype)
    G = (Q * values) @ Q.T
    solvers = [Solver(W.T * scale, pattern, rank) for W, rank in zip(weights, ranks, strict=True)]
    for iteration in range(1, iterations + 1):
        if iteration % PERIOD == 1:
            inverse = (Q * (rho / (values + rho))) @ Q.T
        before, rho = rho, RHO_FIRST * growth ** (iteration // PERIOD * PERIOD / iterations)
        for solver in solvers:
            solver.step(inverse, G, dual_factor=before / rho, accelerate=4 * iteration <= 3 * iterations)
    return [solver.split(scale) for solver in solvers]


class OutputChunk:
    """Some outputs of a weight T (n, m), with their D, U and L.

    C: T - L + U before an iteration. E: T - S. mask: 1 for what stays in D, else 0.
    """

    def __init__(self, T: Weight, pattern: Pattern) -> None:
        self.T, self.pattern, self.C, self.E, self.L = T, pattern, T.clone(), torch.empty_like(T), torch.zeros_like(T)
        self.mask = self.best_mask(T)
        self.D = T * self.mask

    def best_mask(self, T: Weight) -> Weight:
        scores = T.abs().T
        if self.pattern.is_grouped:
            return ranks_in_group(scores, self.pattern.group).lt_(int(self.pattern.keep)).T
        return free_mask(scores, self.pattern.density, by_row=True).T.to(scores.dtype)

    def update_sparse(self, inverse: Square, dual_factor: float) -> None:
        """Update E, D and U; C keeps U alone. inverse: rho (G + rho I)^-1. dual_factor: of U, as rho grows."""
        change = torch.mm(inverse, self.D.sub_(self.C), out=self.E)  # S - (T - L)
        wanted = self.C.add_(change)
        torch.sub(self.L, change, out=self.E)
        self.mask = self.best_mask(wanted)
        torch.mul(wanted, self.mask, out=self.D)
        self.C.sub_(self.D).mul_(dual_factor)


class Solver:
    """A weight T (n, m) in chunks of outputs, and the best L = Y V^T: Y (n, r), V (m, r) with orthonormal columns."""

    def __init__(self, T: Weight, pattern: Pattern, rank: int) -> None:
        n, m = T.shape
        self.chunks = [OutputChunk(part.contiguous(), pattern) for part in T.split(max(CHUNK // n, 1), dim=1)]
        self.sizes, self.rank, self.steps = [chunk.T.shape[1] for chunk in self.chunks], rank, START_STEPS
        self.Y = T.new_zeros(n, rank)
        self.V = torch.randn(m, rank, generator=torch.Generator().manual_seed(0), dtype=T.dtype).to(T.device)

    def step(self, inverse: Square, G: Square, *, dual_factor: float, accelerate: bool) -> None:
        for chunk in self.chunks:
            chunk.update_sparse(inverse, dual_factor)
        if self.rank:
            Y, V, momentum = self.Y, self.V, MOMENTUM if accelerate else 0.0
            # A step of subspace iteration with E^T G E, then E projected on the directions.
            for _ in range(self.steps):
                weighted = G @ self.product(self.V)
                self.V = torch.linalg.qr(torch.cat([chunk.E.T @ weighted for chunk in self.chunks])).Q
            self.Y, self.steps = self.product(self.V), 1
            # L <- new + momentum (new - Y V^T), Y V^T the best of the iteration before
            Y, V = torch.cat([self.Y * (1 + momentum), Y * -momentum], dim=1), torch.cat([self.V, V], dim=1)
            for chunk, both in zip(self.chunks, V.split(self.sizes), strict=True):
                torch.mm(Y, both.T, out=chunk.L)
        for chunk in self.chunks:
            chunk.C.add_(chunk.T).sub_(chunk.L)

    def product(self, directions: Float[Tensor, "m r"]) -> Float[Tensor, "n r"]:
        """E directions."""
        parts = zip(self.chunks, directions.split(self.sizes), strict=True)
        return torch.stack([chunk.E @ part for chunk, part in parts]).sum(0)

    def split(self, scale: Float[Tensor, "n 1"]) -> Split:
        S, mask = (torch.cat([getattr(chunk, name) for chunk in self.chunks], dim=1) for name in ("D", "mask"))
        return Split((S / scale).T, (self.Y / scale @ self.V.T).T, mask.bool().T)
