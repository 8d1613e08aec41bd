"""Structured Optimal Brain Surgeon: remove units of a linear layer's input, neurons of an MLP or groups of heads.

For the quadratic loss tr (W - W')^T G (W - W'), removing unit j, the rows j of W, costs at least
tr W_j^T ([G^-1]_jj)^-1 W_j, and the other rows compensate: W <- W - [G^-1]_:j ([G^-1]_jj)^-1 W_j. The cheapest unit
goes, G^-1 is brought up to date, and so on: greedy, each step exact. The formula is that of Hassibi and Stork (1993)
for one weight, taken over rows as in ZipLM (arXiv 2302.04089, section 3).

The costs need no more of W than M = W W^T. With P = G^-1, removing row r changes both by a symmetric update,

    l = P_:r / sqrt(P_rr)     z = M_:r / sqrt(P_rr) - l M_rr / (2 P_rr)     P <- P - l l^T     M <- M - l z^T - z l^T

and the next row needs one column of each. So the updates are collected and applied 64 at a time, as in LAPACK's blocked
pivoted Cholesky (pstrf): the removals and their order are those of the plain loop, at the speed of matrix products.

Dimensions: k inputs in units of s rows each, m outputs. In all formulas G is the damped second moment of the inputs;
functions take it undamped.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from compress.errors import NumericalError
from compress.numerics.ridge import cholesky, damped

Matrix = Float64[Tensor, "k m"]
Moment = Float64[Tensor, "k k"]
Units = Int64[Tensor, "count s"]

PENDING = 64  # updates that are collected before they are applied


@dataclass(frozen=True)
class Elimination:
    """In which order units go, and what each costs.

    order: the units in the order in which they are removed; the first n of it are removed where n units are to go.
    costs: the loss tr (W - W')^T G (W - W') after each removal, in the units of G, which is the damped one.
    count: the number of units before.
    """

    order: Int64[Tensor, "removed"]
    costs: Float64[Tensor, "removed"]
    count: int

    def kept(self, keep: int) -> Int64[Tensor, "keep"]:
        """The `keep` units that stay, by their indices, increasing."""
        stay = torch.ones(self.count, dtype=torch.bool, device=self.order.device)
        stay[self.order[: self.count - keep]] = False
        return stay.nonzero()[:, 0]


def elimination(W: Matrix, G: Moment, units: Units, down_to: int, *, damping: float, name: str) -> Elimination:
    """Remove the cheapest unit, again and again, until `down_to` of them are left.

    units: the rows of each unit; rows in no unit (another branch's inputs, a shortcut's, a bias) always stay.
    damping: added to the diagonal of G, as a share of its mean.
    name: whose inputs these are, for errors. Raises NumericalError where G or W is not finite, or G is zero.
    """
    inverse = torch.cholesky_inverse(cholesky(damped(G, damping), name=name))
    remainder = _Remainder(inverse, W @ W.T)
    removed = torch.zeros(len(units), dtype=torch.bool, device=W.device)
    order, rises = [], []
    for _ in range(len(units) - down_to):
        rise, unit = remainder.costs(units).masked_fill_(removed, torch.inf).min(0)
        order.append(int(unit))
        rises.append(max(float(rise), 0.0))
        removed[unit] = True
        for row in units[unit].tolist():
            remainder.remove(row)
    if not all(map(math.isfinite, rises)):
        raise NumericalError(f"What pruning {name} costs is a NaN or Inf. Check the weights before it and the text.")
    costs = torch.tensor(rises, dtype=W.dtype, device=W.device).cumsum(0)
    return Elimination(torch.tensor(order, dtype=torch.int64, device=W.device), costs, len(units))


def compensated(
    W: Matrix, G: Moment, units: Units, kept: Int64[Tensor, "keep"], *, damping: float, name: str
) -> Matrix:
    """Return the W' of least loss in which the rows of all units but the kept ones are zero.

    W'_K = W_K + (G_KK)^-1 G_KR W_R         K: the rows that stay, R: those removed
    """
    stays = torch.ones(len(W), dtype=torch.bool, device=W.device)
    stays[units.flatten()] = False
    stays[units[kept].flatten()] = True
    K, R = stays.nonzero()[:, 0], (~stays).nonzero()[:, 0]
    among = G[K[:, None], K]
    among.diagonal().add_(damping * G.diagonal().mean())
    found = torch.zeros_like(W)
    found[K] = W[K] + torch.cholesky_solve(G[K[:, None], R] @ W[R], cholesky(among, name=name))
    return found


class _Remainder:
    """P = G^-1 and M = W W^T while rows are removed; both are overwritten.

    L and Z hold l and z of each pending update as rows: P - L^T L and M - L^T Z - Z^T L are up to date. So are p and m,
    the diagonals, always. Removed rows are rounding noise that is never read.
    """

    def __init__(self, P: Moment, M: Moment) -> None:
        self.P, self.M = P, M
        self.p, self.m = P.diagonal().clone(), M.diagonal().clone()
        self.L, self.Z = P.new_empty(PENDING, len(P)), P.new_empty(PENDING, len(P))
        self.pending = 0

    def costs(self, units: Units) -> Float64[Tensor, "count"]:
        """What the loss rises by if a unit is removed: tr (P_jj)^-1 M_jj for every unit j."""
        if units.shape[1] == 1:
            return self.m[units[:, 0]] / self.p[units[:, 0]]
        self._apply()
        blocks = units[:, :, None], units[:, None, :]
        products, _ = torch.linalg.solve_ex(self.P[blocks], self.M[blocks])  # singular where a unit is removed
        return products.diagonal(dim1=1, dim2=2).sum(1)

    def remove(self, row: int) -> None:
        L, Z = self.L[: self.pending], self.Z[: self.pending]
        P_r = torch.addmv(self.P[row], L.T, L[:, row], alpha=-1)
        M_r = torch.addmv(self.M[row], L.T, Z[:, row], alpha=-1).addmv_(Z.T, L[:, row], alpha=-1)
        root = P_r[row].sqrt()
        l_r = torch.div(P_r, root, out=self.L[self.pending])
        z_r = torch.sub(M_r / root, l_r * (M_r[row] / (2 * P_r[row])), out=self.Z[self.pending])
        self.p.addcmul_(l_r, l_r, value=-1)
        self.m.addcmul_(l_r, z_r, value=-2)
        self.pending += 1
        if self.pending == PENDING:
            self._apply()

    def _apply(self) -> None:
        L, Z = self.L[: self.pending], self.Z[: self.pending]
        self.P.addmm_(L.T, L, alpha=-1)
        self.M.addmm_(torch.cat([L, Z]).T, torch.cat([Z, L]), alpha=-1)
        self.pending = 0
