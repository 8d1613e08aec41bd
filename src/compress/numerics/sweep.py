"""Rounding and pruning column by column, each error made up for by the columns behind it: GPTQ and SparseGPT in one.

    min ||(W - Q) X||^2 = tr (W - Q) H (W - Q)^T,   H = E x x^T

With U the upper Cholesky factor of H^-1, H^-1 = U^T U, the column j is settled, q_j, and the rest of W takes over what
it can: W_j: -= (w_j - q_j) / U_jj U_j: (GPTQ, arXiv 2210.17323, section 3; SparseGPT, arXiv 2301.00774, section 3).
What is pruned is decided on the way, when a group's first column is reached, by w^2 / U_jj^2. Columns are taken in
blocks: within one the updates are small, and the rest of the matrix is brought up to date once a block.

`descend` goes on from there: coordinate descent on the same error, column by column, which can also take back what an
earlier column did (QuantEase, arXiv 2309.01885). Each step is exact, so the error never grows.

Dimensions: W (m, n), m outputs, n inputs.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from compress.numerics.grids import Grid
from compress.numerics.hessian import Hessian
from compress.numerics.sparsity import Pattern, free_mask, grouped_mask

BLOCK = 128


def sweep(
    W: Float[Tensor, "m n"],
    hessian: Hessian,
    *,
    grid: Grid | None = None,
    pattern: Pattern | None = None,
    mask: Bool[Tensor, "m n"] | None = None,
    by_activation: bool = False,
    block: int = BLOCK,
) -> tuple[Float[Tensor, "m n"], Bool[Tensor, "m n"] | None]:
    """W on the grid and within the mask, and the mask; None where there is none.

    pattern: what a mask is to be found for; mask: the one to keep to. by_activation: columns are taken by decreasing
    H_jj; where the mask is to be found, its groups stay together and the order is the given one.
    """
    n, by_activation = W.shape[1], by_activation and pattern is None
    U = (hessian.ordered_inverse_root if by_activation else hessian.inverse_root).to(W.dtype)
    columns = hessian.order.tolist() if by_activation else list(range(n))
    rest, Q = W[:, hessian.order] if by_activation else W.clone(), torch.zeros_like(W)
    found = None if pattern is None and mask is None else torch.ones_like(W, dtype=torch.bool) if mask is None else mask
    for start, stop in blocks(n, block, pattern):
        if pattern is not None and not pattern.is_grouped:
            assert found is not None
            found[:, start:stop] = free_mask(saliency(rest, U, start, stop), pattern.density, by_row=False)
        errors = torch.zeros_like(rest[:, start:stop])
        for j in range(start, stop):
            if pattern is not None and pattern.is_grouped and j % pattern.group == 0:
                assert found is not None
                end = j + pattern.group
                found[:, j:end] = grouped_mask(saliency(rest, U, j, end), pattern)
            column, w = columns[j], rest[:, j : j + 1]
            q = settled(w, column, grid, found)
            Q[:, column : column + 1] = q
            error = (w - q) / U[j, j]
            rest[:, j:stop] -= error @ U[j : j + 1, j:stop]
            errors[:, j - start : j - start + 1] = error
        rest[:, stop:] -= errors @ U[start:stop, stop:]
    return Q, found


def blocks(n: int, block: int, pattern: Pattern | None) -> Iterator[tuple[int, int]]:
    """From where to where; no group of the pattern is cut."""
    grouped = pattern is not None and pattern.is_grouped
    step = max(block // pattern.group, 1) * pattern.group if grouped and pattern else block
    for start in range(0, n, step):
        yield start, min(start + step, n)


def saliency(rest: Tensor, U: Tensor, start: int, stop: int) -> Tensor:
    """What deleting each weight costs, all else at its best."""
    return (rest[:, start:stop] / U.diagonal()[start:stop]).square()


def settled(
    w: Float[Tensor, "m 1"], column: int, grid: Grid | None, mask: Bool[Tensor, "m n"] | None
) -> Float[Tensor, "m 1"]:
    q = w if grid is None else grid.nearest(w, column)
    return q if mask is None else q * mask[:, column : column + 1]


def descend(
    Q: Float[Tensor, "m n"],
    W: Float[Tensor, "m n"],
    hessian: Hessian,
    *,
    grid: Grid | None = None,
    mask: Bool[Tensor, "m n"] | None = None,
    rounds: int,
    block: int = BLOCK,
) -> Float[Tensor, "m n"]:
    """Q, on the grid and within the mask, with every column in turn at its best for the others as they are.

    Fewer than `rounds` where nothing changes any more.
    """
    H = hessian.damped.to(W.dtype)
    Q, n = Q.clone(), W.shape[1]
    slope = (W - Q) @ H
    for _ in range(rounds):
        before = Q.clone()
        for start in range(0, n, block):
            stop = min(start + block, n)
            old, near = Q[:, start:stop].clone(), slope[:, start:stop].clone()
            for j in range(start, stop):
                q = Q[:, j : j + 1]
                wanted = q + near[:, j - start : j - start + 1] / H[j, j]
                new = settled(wanted, j, grid, mask)
                near -= (new - q) @ H[j : j + 1, start:stop]
                Q[:, j : j + 1] = new
            slope -= (Q[:, start:stop] - old) @ H[start:stop]
        if torch.equal(Q, before):
            break
    return Q
