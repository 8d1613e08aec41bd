"""Fit a grid's steps to the codes that a sweep has found, in closed form.

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
from compress.numerics.sweep import BLOCK, spans

FURTHEST = 2.0  # a step moves to no less than half of itself and no more than twice


def rescaled(
    Q: Float[Tensor, "m n"],
    W: Float[Tensor, "m n"],
    hessian: Hessian,
    grid: Grid,
    *,
    stored: torch.dtype | None = None,
) -> tuple[Float[Tensor, "m n"], Grid]:
    """Return Q with the same codes and better steps, and the grid with these steps.

    stored: the dtype that steps are rounded to.
    """
    H, size, n = hessian.damped.to(W.dtype), grid.group, W.shape[1]
    units = replace(grid, step=torch.ones_like(grid.step)).values(grid.codes(Q)).T.contiguous()
    slope, steps = H @ (W - Q).T, grid.step.T.clone(memory_format=torch.contiguous_format)
    changes = torch.empty_like(slope)
    for start, stop in spans(0, n, max(BLOCK // size, 1) * size):
        for first, last in spans(start, stop, size):
            q, step, group = units[first:last], steps[first // size], slice(first, last)
            gain, curvature = (q * slope[group]).sum(0), (q * (H[group, group] @ q)).sum(0)
            if len(step) == 1:
                gain, curvature = gain.sum(0, keepdim=True), curvature.sum(0, keepdim=True)
            new = torch.where(curvature > 0, step + gain / curvature, step)  # all codes zero: any step will do
            new = rounded(torch.minimum(torch.maximum(new, step / FURTHEST), step * FURTHEST), stored, grid.divisor)
            torch.mul(q, new - step, out=changes[group])
            slope[last:stop].addmm_(H[last:stop, group], changes[group], alpha=-1)
            step.copy_(new)
        slope[stop:].addmm_(H[stop:, start:stop], changes[start:stop], alpha=-1)
    better = replace(grid, step=steps.T)
    return (units * better.scale(n).T).T, better
