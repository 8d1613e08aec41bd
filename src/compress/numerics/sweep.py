"""Quantize and prune column by column, later columns compensating for each error: GPTQ and SparseGPT in one.

    min ||(W - Q) X||^2 = tr (W - Q) H (W - Q)^T,   H = E x x^T

With U the upper Cholesky factor of H^-1, H^-1 = U^T U, the column j is fixed, q_j, and the rest of W takes over what
it can: W_j: -= (w_j - q_j) / U_jj U_j: (GPTQ, arXiv 2210.17323, section 3; SparseGPT, arXiv 2301.00774, section 3).
What is pruned is decided on the way, when a group's first column is reached, by w^2 / U_jj^2.

`descend` goes on from there: coordinate descent on the same error, column by column, which can also take back what an
earlier column did (QuantEase, arXiv 2309.01885). Each step is exact, so the error never grows.

Both fix columns in order, and the error of each changes the targets of the later ones by a row of a matrix:
`fix_columns`. It works on the transposed matrix, where a column is contiguous, in blocks of two sizes: within a small
block a column is brought up to date by the columns before it, everything else by products at the ends of blocks.

`rescaled` fits a grid's steps to the codes that a sweep has found, in closed form. With codes q of a group (a row's,
n_g inputs) and all else as it is, E ||(W - Q) x||^2 is a parabola in its step, least at

    step + q (W - Q) H_g / (q H_gg q^T)

Groups are taken one after the other, each for the others as they are by then.

Dimensions: W (m, n), m outputs, n inputs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from compress.numerics.grids import Grid
from compress.numerics.moments import Hessian
from compress.numerics.sparsity import Pattern, keep_mask
from compress.numerics.steps import rounded

Weight = Float[Tensor, "m n"]
Columns = Float[Tensor, "n m"]
Mask = Bool[Tensor, "m n"]

BLOCK, SMALL = 128, 16


def sweep(
    W: Weight,
    hessian: Hessian,
    *,
    grid: Grid | None = None,
    pattern: Pattern | None = None,
    mask: Mask | None = None,
    actorder: bool = False,
) -> tuple[Weight, Mask | None]:
    """Sweep over W; return it on the grid and within the mask, and the mask if there is one.

    pattern: what a mask is to be found for; mask: the one to keep to. actorder: columns are taken by decreasing
    H_jj; where the mask is to be found, its groups stay together and the order is the given one.
    """
    order = hessian.order if actorder and pattern is None else None
    U = (hessian.inverse_root if order is None else hessian.ordered_inverse_root).to(W.dtype)
    rest = in_order(W, order).clone()
    rounding = ColumnRounding(grid, mask, order, W.shape[1], W.dtype)
    if pattern is not None:
        rounding.search_mask(pattern, U.diagonal(), like=rest)
    Q = fix_columns(rest, U / U.diagonal()[:, None], rounding)
    if order is not None:
        Q = Q[order.argsort()]
    return Q.T, mask if pattern is None or rounding.kept is None else rounding.kept.T.bool()


def descend(
    Q: Weight, W: Weight, hessian: Hessian, *, grid: Grid | None = None, mask: Mask | None = None, rounds: int
) -> Weight:
    """Coordinate descent: set every column of Q in turn to its best value on the grid, the others fixed.

    Fewer than `rounds` where nothing changes any more.
    """
    H, rounding = hessian.damped.to(W.dtype), ColumnRounding(grid, mask, None, W.shape[1], W.dtype)
    now = in_order(Q, None)
    slope = H @ (in_order(W, None) - now)
    for _ in range(rounds):
        before, now = now, descended(now, slope, H, rounding)
        if torch.equal(now, before):
            break
    return now.T


def descended(now: Columns, slope: Columns, H: Float[Tensor, "n n"], rounding: "ColumnRounding") -> Columns:
    """One round of the descent on Q^T. slope: H (W - Q)^T, brought up to date in place."""
    found, step_sizes = torch.empty_like(now), (1 / H.diagonal()).tolist()
    for start, stop in spans(0, len(now), BLOCK):
        part, change = slice(start, stop), slope[start:stop].clone()
        found[part] = fix_columns(
            change, H[part, part], rounding, old=now[part], step_sizes=step_sizes[part], first=start
        )
        slope.addmm_(H[:, part], change, alpha=-1)
    return found


def fix_columns(
    rest: Columns,
    coupling: Float[Tensor, "n n"],
    rounding: "ColumnRounding",
    *,
    old: Columns | None = None,
    step_sizes: Sequence[float] = (),
    first: int = 0,
) -> Columns:
    """Q, whose column j is rest_j rounded, or with `old`, old_j + step_sizes_j rest_j rounded.

    After each column, coupling[j, k] times its error is subtracted from rest_k for all later k. The error is
    rest_j - q_j, or with `old`, q_j - old_j. In the end `rest` holds these errors. first: the number of the first
    column as `rounding` counts them.
    """
    n, unit = len(rest), rounding.unit
    small = SMALL if unit == 1 else unit
    Q = torch.empty_like(rest)
    columns, error = Q.unbind(), rest.unbind()
    for start, stop in spans(0, n, max(BLOCK // unit, 1) * unit):
        rounding.find_mask(rest, start, stop, grouped=False)
        for begin, last in spans(start, stop, small):
            rounding.find_mask(rest, begin, last, grouped=True)
            for j in range(begin, last):
                if j > begin:
                    error[j].addmv_(rest[begin:j].T, coupling[begin:j, j], alpha=-1)
                if old is None:
                    rounding.round(first + j, error[j], out=columns[j])
                    error[j].sub_(columns[j])
                else:
                    target = torch.add(old[j], error[j], alpha=step_sizes[j], out=error[j])
                    rounding.round(first + j, target, out=columns[j])
                    torch.sub(columns[j], old[j], out=error[j])
            rest[last:stop].addmm_(coupling[begin:last, last:stop].T, rest[begin:last], alpha=-1)
        rest[stop:].addmm_(coupling[start:stop, stop:].T, rest[start:stop], alpha=-1)
    return Q


class ColumnRounding:
    """Round columns to a grid, within a mask that is given or found on the way.

    order: in which columns are taken; None for their own. kept: the mask (n, m) in that order, 1 for what stays.
    """

    def __init__(self, grid: Grid | None, mask: Mask | None, order: Tensor | None, n: int, dtype: torch.dtype) -> None:
        self.kind = None if grid is None else grid.kind
        if grid is not None:
            size, scale, offset = grid.group_size, grid.step, grid.zero
            if grid.finer is not None:  # each input has a scale of its own
                size, scale, offset = 1, grid.scale(n), grid.offset(n)
            self.group = [j // size for j in (range(n) if order is None else order.tolist())]
            self.scale = scale.T.contiguous().unbind()
            self.offset = None if offset is None else offset.T.contiguous().unbind()
        self.kept = None if mask is None else in_order(mask.to(dtype), order)
        self.pattern: Pattern | None = None

    def search_mask(self, pattern: Pattern, spread: Float[Tensor, "n"], *, like: Columns) -> None:
        """Find the mask on the way by the cost of deleting a weight, all later ones at their best: (w / spread)^2."""
        self.pattern, self.spread, self.kept = pattern, spread[:, None], torch.ones_like(like)

    @property
    def unit(self) -> int:
        """Number of columns that the mask is found for at a time."""
        return self.pattern.group if self.pattern is not None and self.pattern.is_grouped else 1

    def find_mask(self, rest: Columns, start: int, stop: int, *, grouped: bool) -> None:
        """Find the mask of columns start .. stop, if one is searched and its pattern is `grouped` or not."""
        if self.kept is not None and self.pattern is not None and self.pattern.is_grouped == grouped:
            cost = (rest[start:stop] / self.spread[start:stop]).square_()
            self.kept[start:stop] = keep_mask(cost.T, self.pattern, by_row=False).T

    def round(self, j: int, w: Float[Tensor, "m"], *, out: Float[Tensor, "m"]) -> None:
        """Write the allowed values nearest to w into `out`."""
        if self.kind is None:
            out.copy_(w)
        else:
            scale, offset = self.scale[self.group[j]], None if self.offset is None else self.offset[self.group[j]]
            torch.div(w, scale, out=out)
            if offset is not None:
                out.add_(offset)
            self.kind.nearest_(out)
            if offset is not None:
                out.sub_(offset)
            out.mul_(scale)
        if self.kept is not None:
            out.mul_(self.kept[j])


def in_order(W: Weight, order: Tensor | None) -> Columns:
    """Transpose into contiguous memory; not always a copy."""
    return W.T.contiguous() if order is None else W.T[order]


def spans(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


FURTHEST = 2.0  # a step moves to no less than half of itself and no more than twice


def rescaled(
    Q: Weight, W: Weight, hessian: Hessian, grid: Grid, *, stored: torch.dtype | None = None
) -> tuple[Weight, Grid]:
    """Return Q with the same codes and better steps, and their grid. stored: the dtype that steps are rounded to."""
    H, size, n = hessian.damped.to(W.dtype), grid.group_size, W.shape[1]
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
