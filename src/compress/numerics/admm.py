"""A sparse and a low-rank matrix that together stand for a third: 3BASiL's three-block ADMM (NeurIPS 2025).

    min over S, L   ||(W - S - L) X||^2    S within a pattern, rank L <= r

Mask, weights and low rank settle together. With inputs scaled so that G = E x x^T has a unit diagonal, D the copy of S
that keeps to the pattern, U the scaled dual:

    S <- W - L + rho (D - U - (W - L)) (G + rho I)^-1
    L <- the best rank r of W - S, an error measured by G
    D <- the pattern's best of S + U
    U <- U + S - D,   rho grows

Ours is how that is paced and computed. rho grows by the same factor every few iterations: the mask moves much at first and
is at rest in the end, and the slower it is brought to rest, the better it is. (3BASiL goes by how much has moved, which
takes twice as many iterations to a mask as good.) Between two changes of rho an iteration takes one product of whole
matrices, and L a step of subspace iteration from its last directions instead of a decomposition.

Dimensions: W (m, n), m outputs, n inputs, r the rank. Everything is transposed here, so that what is compared for the
mask lies in different rows: T, S and L are (n, m).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from compress.numerics.hessian import Hessian
from compress.numerics.sparsity import Pattern, free_mask, places

FIRST, LAST = 0.1, 0.6  # rho, of the unit diagonal
PACE = 6  # iterations from one rho to the next
START = 4  # steps of subspace iteration in the first of them, one in each of the others
AT_ONCE = 2**18  # numbers of a lot's matrices
AT_REST = 5e-4  # the share of the kept weights that still moves meanwhile


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
    """Of weights with the same inputs, each with a rank of its own. Fewer `iterations` where the masks are at rest."""
    dtype, rho = weights[0].dtype, FIRST
    scale, (values, Q) = hessian.scale.to(dtype)[:, None], hessian.scaled_eigen(dtype)
    G = (Q * values) @ Q.T
    sums = [SparsePlusLowRank(W.T * scale, pattern, rank) for W, rank in zip(weights, ranks, strict=True)]
    for iteration in range(1, iterations + 1):
        if iteration % PACE == 1:
            inverse = (Q * (rho / (values + rho))) @ Q.T
        before, rho = rho, FIRST * (LAST / FIRST) ** (iteration // PACE * PACE / iterations)
        for each in sums:
            each.step(inverse, G, before / rho)
        if iteration % PACE == 0 and sum(each.moved() for each in sums) <= AT_REST * sum(W.numel() for W in weights):
            break
    return [Split(*((part / scale).T for part in (each.S, each.L)), each.mask.T) for each in sums]


class Outputs:
    """Some outputs of a weight T (n, m), so few that what is made of them stays in a core's cache.

    C: T - L + U. moved: S - (T - L). mask: 1 for what stays in D, else 0.
    """

    def __init__(self, T: Float[Tensor, "n m"], pattern: Pattern) -> None:
        self.T, self.pattern, self.C, self.moved = T, pattern, T.clone(), torch.empty_like(T)
        self.mask = self.looked = self.kept(T)
        self.D = T * self.mask

    def kept(self, wanted: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        scores = wanted.abs().T
        if self.pattern.is_grouped:
            return places(scores, self.pattern.group).lt_(int(self.pattern.keep)).T
        return free_mask(scores, self.pattern.density, by_row=True).T.to(scores.dtype)

    def step(self, inverse: Float[Tensor, "n n"], shrinks: float) -> None:
        """S, D and U; `shrinks`: what U is multiplied by as rho grows. C is left with U alone."""
        torch.mm(inverse, self.D.sub_(self.C), out=self.moved)
        wanted = self.C.add_(self.moved)
        self.mask = self.kept(wanted)
        torch.mul(wanted, self.mask, out=self.D)
        self.C.sub_(self.D).mul_(shrinks)


class SparsePlusLowRank:
    """A weight T (n, m) in lots of outputs, and L = Y V^T: Y (n, r), V (m, r) with orthonormal columns."""

    def __init__(self, T: Float[Tensor, "n m"], pattern: Pattern, rank: int) -> None:
        n, m = T.shape
        self.lots = [Outputs(part.contiguous(), pattern) for part in T.split(max(AT_ONCE // n, 1), dim=1)]
        self.sizes, self.rank, self.steps = [lot.T.shape[1] for lot in self.lots], rank, START
        self.Y = T.new_zeros(n, rank)
        self.V = torch.randn(m, rank, generator=torch.Generator().manual_seed(0), dtype=T.dtype).to(T.device)

    def step(self, inverse: Float[Tensor, "n n"], G: Float[Tensor, "n n"], shrinks: float) -> None:
        for lot in self.lots:
            lot.step(inverse, shrinks)
        if self.rank:
            self.refit(G)
        for lot, V in zip(self.lots, self.V.split(self.sizes), strict=True):
            lot.C.add_(lot.T).addmm_(self.Y, V.T, alpha=-1)

    def refit(self, G: Float[Tensor, "n n"]) -> None:
        """L nearer to the best for what S lacks, E = T - S = L - moved: a step of subspace iteration with E^T G E."""
        Y, V = self.Y, self.V

        def missed(directions: Float[Tensor, "m r"]) -> Float[Tensor, "n r"]:
            """E times directions of the outputs."""
            parts = zip(self.lots, directions.split(self.sizes), strict=True)
            return Y @ (V.T @ directions) - torch.stack([lot.moved @ part for lot, part in parts]).sum(0)

        for _ in range(self.steps):
            weighed = G @ missed(self.V)
            moved = torch.cat([lot.moved.T @ weighed for lot in self.lots])
            self.V = torch.linalg.qr(V @ (Y.T @ weighed) - moved).Q
        self.Y, self.steps = missed(self.V), 1

    def moved(self) -> Tensor:
        """How many weights have come into the mask, or gone, since this was asked for last."""
        changed = [(lot.mask != lot.looked).sum() for lot in self.lots]
        for lot in self.lots:
            lot.looked = lot.mask
        return torch.stack(changed).sum()

    @property
    def S(self) -> Float[Tensor, "n m"]:
        return torch.cat([lot.D for lot in self.lots], dim=1)

    @property
    def mask(self) -> Bool[Tensor, "n m"]:
        return torch.cat([lot.mask for lot in self.lots], dim=1).bool()

    @property
    def L(self) -> Float[Tensor, "n m"]:
        return self.Y @ self.V.T
