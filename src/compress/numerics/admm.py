"""A sparse and a low-rank matrix whose sum is near a weight: 3BASiL's three-block ADMM (NeurIPS 2025).

    min over S, L   ||(W - S - L) X||^2    S within a pattern, rank L <= r

Mask, weights and low rank are found together. With inputs scaled so that G = E x x^T has a unit diagonal, D the copy of
S that keeps to the pattern, U the scaled dual:

    S <- W - L + rho (D - U - (W - L)) (G + rho I)^-1
    D <- the pattern's best of S + U
    U <- U + S - D
    L <- the best rank r of W - S, an error measured by G

The schedule of rho and the update of L are ours. rho grows from RHO_FIRST to RHO_LAST, by the same factor every PERIOD
iterations: the mask changes much at first and hardly in the end, and the slower rho grows, the better the mask. (3BASiL
raises rho by how much the mask has changed, which takes twice as many iterations for a mask as good.) An iteration
takes one product of n x n with n x m, by a matrix that is made anew only when rho changes. L takes one step of subspace
iteration from its last directions instead of a decomposition.

Dimensions: W (m, n), m outputs, n inputs, r the rank. Everything is transposed here, so that the weights that a mask
compares lie in different rows: T, the scaled W, S and L are (n, m).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from compress.numerics.hessian import Hessian
from compress.numerics.sparsity import Pattern, free_mask, ranks_in_group

RHO_FIRST, RHO_LAST = 0.1, 0.6  # in units of G's diagonal
PERIOD = 6  # iterations with the same rho
START_STEPS = 4  # of subspace iteration in the first iteration; one in each of the others
CHUNK = 2**18  # weights that an iteration works on at a time: what is computed from them stays in a core's cache
TOLERANCE = 5e-4  # iterations end when no more than this share of the mask changes in a period


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
    """Split weights with the same inputs, each with a rank of its own.

    iterations: at most; fewer once the masks hardly change.
    """
    dtype, rho = weights[0].dtype, RHO_FIRST
    scale, (values, Q) = hessian.scale.to(dtype)[:, None], hessian.scaled_eigen(dtype)
    G = (Q * values) @ Q.T
    solvers = [Solver(W.T * scale, pattern, rank) for W, rank in zip(weights, ranks, strict=True)]
    for iteration in range(1, iterations + 1):
        if iteration % PERIOD == 1:
            inverse = (Q * (rho / (values + rho))) @ Q.T
        before, rho = rho, rho_after(iteration, iterations)
        for solver in solvers:
            solver.step(inverse, G, dual_factor=before / rho)
        if iteration % PERIOD == 0:
            changed = sum(solver.count_changed() for solver in solvers)
            if changed <= TOLERANCE * sum(W.numel() for W in weights):
                break
    return [solver.split(scale) for solver in solvers]


def rho_after(iteration: int, iterations: int) -> float:
    return RHO_FIRST * (RHO_LAST / RHO_FIRST) ** (iteration // PERIOD * PERIOD / iterations)


class OutputChunk:
    """Some outputs of a weight T (n, m), with their S, D and U.

    C: T - L + U before an iteration. change: S - (T - L). mask: 1 for what stays in D, else 0.
    """

    def __init__(self, T: Float[Tensor, "n m"], pattern: Pattern) -> None:
        self.T, self.pattern, self.C, self.change = T, pattern, T.clone(), torch.empty_like(T)
        self.mask = self.counted_mask = self.best_mask(T)
        self.D = T * self.mask

    def best_mask(self, T: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        scores = T.abs().T
        if self.pattern.is_grouped:
            return ranks_in_group(scores, self.pattern.group).lt_(int(self.pattern.keep)).T
        return free_mask(scores, self.pattern.density, by_row=True).T.to(scores.dtype)

    def step(self, inverse: Float[Tensor, "n n"], dual_factor: float) -> None:
        """Update S, D and U; C is left with U alone.

        inverse: rho (G + rho I)^-1. dual_factor: what U is multiplied by as rho grows.
        """
        torch.mm(inverse, self.D.sub_(self.C), out=self.change)
        wanted = self.C.add_(self.change)
        self.mask = self.best_mask(wanted)
        torch.mul(wanted, self.mask, out=self.D)
        self.C.sub_(self.D).mul_(dual_factor)


class Solver:
    """A weight T (n, m) in chunks of outputs, and L = Y V^T: Y (n, r), V (m, r) with orthonormal columns."""

    def __init__(self, T: Float[Tensor, "n m"], pattern: Pattern, rank: int) -> None:
        n, m = T.shape
        self.chunks = [OutputChunk(part.contiguous(), pattern) for part in T.split(max(CHUNK // n, 1), dim=1)]
        self.sizes, self.rank, self.steps = [chunk.T.shape[1] for chunk in self.chunks], rank, START_STEPS
        self.Y = T.new_zeros(n, rank)
        self.V = torch.randn(m, rank, generator=torch.Generator().manual_seed(0), dtype=T.dtype).to(T.device)

    def step(self, inverse: Float[Tensor, "n n"], G: Float[Tensor, "n n"], *, dual_factor: float) -> None:
        for chunk in self.chunks:
            chunk.step(inverse, dual_factor)
        if self.rank:
            self.update_lowrank(G)
        for chunk, V in zip(self.chunks, self.V.split(self.sizes), strict=True):
            chunk.C.add_(chunk.T).addmm_(self.Y, V.T, alpha=-1)

    def update_lowrank(self, G: Float[Tensor, "n n"]) -> None:
        """Take a step of subspace iteration with E^T G E, E = T - S = L - change, and project E on the directions."""
        Y, V = self.Y, self.V

        def missing(directions: Float[Tensor, "m r"]) -> Float[Tensor, "n r"]:
            """E directions."""
            parts = zip(self.chunks, directions.split(self.sizes), strict=True)
            return Y @ (V.T @ directions) - torch.stack([chunk.change @ part for chunk, part in parts]).sum(0)

        for _ in range(self.steps):
            weighted = G @ missing(self.V)
            change = torch.cat([chunk.change.T @ weighted for chunk in self.chunks])
            self.V = torch.linalg.qr(V @ (Y.T @ weighted) - change).Q
        self.Y, self.steps = missing(self.V), 1

    def count_changed(self) -> int:
        """How many entries of the mask have changed since the last count."""
        changed = torch.stack([(chunk.mask != chunk.counted_mask).sum() for chunk in self.chunks])
        for chunk in self.chunks:
            chunk.counted_mask = chunk.mask
        return int(changed.sum())

    def split(self, scale: Float[Tensor, "n 1"]) -> Split:
        S, mask = (
            torch.cat(parts, dim=1) for parts in zip(*((chunk.D, chunk.mask) for chunk in self.chunks), strict=True)
        )
        return Split((S / scale).T, (self.Y / scale @ self.V.T).T, mask.bool().T)
