"""Steps at their best for the codes that have been found: what a sweep decides on a grid, the grid may follow.

With codes q of a group (a row's, n_g inputs) and all else as it is, E ||(W - Q) x||^2 is a parabola in its
step, least at

    step + q (W - Q) H_g / (q H_gg q^T)

Groups are taken one after the other, each for the others as they are by then, as columns are in `descend`.

Dimensions: W (m, n), n inputs in groups of `grid.group`.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from compress.numerics.grids import Grid
from compress.numerics.hessian import Hessian
from compress.numerics.steps import rounded

FURTHEST = 2.0  # a step moves to no less than half of itself and no more than twice


def rescaled(
    Q: Float[Tensor, "m n"],
    W: Float[Tensor, "m n"],
    hessian: Hessian,
    grid: Grid,
    *,
    stored: torch.dtype | None = None,
) -> tuple[Float[Tensor, "m n"], Grid]:
    """Q, of the grid's own values, with the same codes and better steps, and the grid that has these.

    stored: the dtype that steps are rounded to.
    """
    H, n = hessian.damped.to(W.dtype), W.shape[1]
    units = replace(grid, step=torch.ones_like(grid.step)).values(grid.codes(Q))
    slope, step = (W - Q) @ H, grid.step.clone()
    for group in range(step.shape[1]):
        inputs = slice(group * grid.group, min((group + 1) * grid.group, n))
        q, old = units[:, inputs], step[:, group : group + 1].clone()
        gain = (q * slope[:, inputs]).sum(1, keepdim=True)
        curvature = ((q @ H[inputs, inputs]) * q).sum(1, keepdim=True)
        if len(step) == 1:
            gain, curvature = gain.sum(0, keepdim=True), curvature.sum(0, keepdim=True)
        new = torch.where(curvature > 0, old + gain / curvature, old)  # all codes zero: any step will do
        new = rounded(torch.minimum(torch.maximum(new, old / FURTHEST), old * FURTHEST), stored)
        slope -= (q * (new - old)) @ H[inputs]
        step[:, group : group + 1] = new
    better = replace(grid, step=step)
    return better.values(grid.codes(Q)), better
