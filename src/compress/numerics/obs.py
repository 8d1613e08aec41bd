"""Optimal Brain Surgeon on whole units of a linear layer's input: neurons of an MLP, groups of attention heads.

For the quadratic E ||u (W - W')||^2 = tr (W - W')^T G (W - W'), setting the rows of one unit j to zero costs at least
tr W_j^T ([G^-1]_jj)^-1 W_j, and all other rows take over what they can: W <- W - [G^-1]_:j ([G^-1]_jj)^-1 W_j. The
unit that costs least goes, G^-1 is brought up to date, and so on: greedy, each step exact. The formula is that of
Hassibi and Stork (1993) for one weight, taken over rows as in ZipLM (arXiv 2302.04089).

Dimensions: k inputs in units of s rows each, m outputs.
"""

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from compress.numerics.ridge import cholesky, damped


def prune_units(
    W: Float64[Tensor, "k m"],
    G: Float64[Tensor, "k k"],
    units: Int64[Tensor, "count s"],
    keep: int,
    *,
    damping: float,
    name: str,
) -> tuple[Int64[Tensor, "keep"], Float64[Tensor, "k m"]]:
    """Which `keep` of the units stay, in their order, and W with the other units' rows zero and theirs made up for.

    units: the rows of each unit; rows in no unit (another branch's inputs, a shortcut's, a bias) always stay.
    name: says in an error whose inputs these are.
    """
    inverse = torch.cholesky_inverse(cholesky(damped(G, damping), name=name))
    W = W.clone()
    alive = torch.ones(len(units), dtype=torch.bool, device=W.device)
    for _ in range(len(units) - keep):
        rows = units[int(unit_costs(W, inverse, units).masked_fill(~alive, torch.inf).argmin())]
        gone = torch.linalg.solve(inverse[rows][:, rows], torch.cat([W[rows], inverse[rows]], dim=1))
        column = inverse[:, rows].clone()
        W -= column @ gone[:, : W.shape[1]]
        inverse -= column @ gone[:, W.shape[1] :]
        # What is gone is out of the others' equations; exact zeros, and ones so that its blocks stay solvable.
        W[rows] = 0
        inverse[rows] = 0
        inverse[:, rows] = 0
        inverse[rows, rows] = 1
        alive &= (units != rows).any(1)
    return alive.nonzero()[:, 0], W


def unit_costs(
    W: Float64[Tensor, "k m"], inverse: Float64[Tensor, "k k"], units: Int64[Tensor, "count s"]
) -> Float64[Tensor, "count"]:
    """tr W_j^T ([G^-1]_jj)^-1 W_j for every unit j."""
    rows = W[units]
    if units.shape[1] == 1:
        return rows.square().sum((1, 2)) / inverse.diagonal()[units[:, 0]]
    blocks = inverse[units[:, :, None], units[:, None, :]]
    return (rows * torch.linalg.solve(blocks, rows)).sum((1, 2))
