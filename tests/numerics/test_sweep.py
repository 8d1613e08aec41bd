"""GPTQ and SparseGPT by their papers' loops, without the Cholesky factor; descent against trying everything."""

import itertools

import pytest
import torch
from torch import Tensor

from compress.errors import NumericalError
from compress.numerics.grids import Grid
from compress.numerics.moments import Hessian
from compress.numerics.sparsity import Pattern, keep_mask
from compress.numerics.steps import make_grid
from compress.numerics.sweep import descend, sweep
from matrices import args_of, difference, random

M, N, TOKENS = 5, 24, 80
WHERE = "block 3 mlp.down_proj"
DAMPING = 0.01
PATTERNS = (None, "2:4", "50%")
GRIDS: dict[str, int | str | None] = {"no grid": None, "by row": "channel", "ragged groups": 7}
EVERY_PATTERN = pytest.mark.parametrize("pattern", PATTERNS, ids=str)
EVERY_GRID = pytest.mark.parametrize("group", GRIDS.values(), ids=GRIDS)
EVERY_BLOCK = pytest.mark.parametrize("block", [3, 128])


def rows(n: int = N, *, count: int = TOKENS, seed: int = 0, dead: tuple[int, ...] = ()) -> Tensor:
    """Correlated inputs of unlike sizes, in no order, whose means are not zero."""
    sizes = torch.logspace(0, -1, n).double()[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
    X = (random(count, n, seed=seed) @ random(n, n, seed=seed + 1) + random(n, seed=seed + 2)) * sizes
    X[:, list(dead)] = 0
    return X


def hessian(X: Tensor, *, damping: float = DAMPING) -> Hessian:
    return Hessian(X.T @ X / len(X), damping, WHERE)


def grid_for(W: Tensor, group: int | str | None, *, bits: int = 3, symmetric: bool = True) -> Grid | None:
    return None if group is None else make_grid(W, args_of(bits, group, symmetric=symmetric), method="mse")


def parsed(text: str | None) -> Pattern | None:
    return None if text is None else Pattern.parse(text)


def error(W: Tensor, Q: Tensor, H: Tensor) -> float:
    """Row by row, (w - q) H (w - q)^T."""
    return sum(float(d @ H @ d) for d in W - Q)


def lowest_cost(costs: Tensor, count: int) -> list[tuple[int, int]]:
    """The places of the `count` least, of costs (rows, columns)."""
    places = list(itertools.product(range(costs.shape[0]), range(costs.shape[1])))
    return sorted(places, key=lambda place: float(costs[place]))[:count]


def swept_slowly(
    W: Tensor, H: Tensor, grid: Grid | None, pattern: Pattern | None, given: Tensor | None, block: int
) -> tuple[Tensor, Tensor]:
    """Optimal Brain Surgeon's update, each column in turn: of all that are left the inverse is computed anew.

    Where a mask is to be found: with the groups of a pattern for each row and group when its first column is reached,
    else for all rows when a block's first one is; by w_j^2 / [H_left^-1]_jj with all before j settled.
    """
    W, Q, mask = W.clone(), torch.zeros_like(W), torch.ones_like(W, dtype=torch.bool) if given is None else given
    m, n = W.shape
    costs_one = torch.stack([torch.linalg.inv(H[j:, j:])[0, 0] for j in range(n)])
    for j in range(n):
        if pattern is not None and pattern.is_grouped and j % pattern.group == 0:
            end = j + pattern.group
            for row in range(m):
                costs = W[row : row + 1, j:end].square() / costs_one[j:end]
                for _, gone in lowest_cost(costs, pattern.group - int(pattern.keep)):
                    mask[row, j + gone] = False
        if pattern is not None and not pattern.is_grouped and j % block == 0:
            costs = W[:, j : j + block].square() / costs_one[j : j + block]
            for row, gone in lowest_cost(costs, int((1 - pattern.density) * costs.numel())):
                mask[row, j + gone] = False
        inverse = torch.linalg.inv(H[j:, j:])
        q = W[:, j] if grid is None else grid.nearest(W)[:, j]
        Q[:, j] = torch.where(mask[:, j], q, 0.0)
        W[:, j:] -= torch.outer((W[:, j] - Q[:, j]) / inverse[0, 0], inverse[0])
    return Q, mask


@EVERY_BLOCK
@EVERY_GRID
@EVERY_PATTERN
def test_it_is_the_papers_loop_whatever_the_block(pattern, group, block, monkeypatch):
    monkeypatch.setattr("compress.numerics.sweep.BLOCK", block)
    W, H = random(M, N), hessian(rows())
    grid = grid_for(W, group)
    found, mask = sweep(W, H, grid=grid, pattern=parsed(pattern))
    expected, expected_mask = swept_slowly(W, H.damped, grid, parsed(pattern), None, block)
    assert difference(found, expected) < 1e-8
    if pattern is None:
        assert mask is None
    else:
        assert torch.equal(mask, expected_mask)


@pytest.mark.parametrize(("group", "block"), [(None, 128), (7, 3)])
def test_it_keeps_to_a_mask_that_it_is_given(group, block, monkeypatch):
    monkeypatch.setattr("compress.numerics.sweep.BLOCK", block)
    W, H = random(M, N), hessian(rows())
    grid, mask = grid_for(W, group), keep_mask(random(M, N, seed=3).abs(), Pattern.parse("2:4"))
    before = mask.clone()
    found, same = sweep(W, H, grid=grid, mask=mask)
    assert torch.equal(same, before)
    assert torch.equal(mask, before)
    assert (found[~mask] == 0).all()
    assert difference(found, swept_slowly(W, H.damped, grid, None, mask, block)[0]) < 1e-8


@pytest.mark.parametrize("block", [5, 128])
@pytest.mark.parametrize("masked", [False, True], ids=["all weights", "given mask"])
def test_act_order_is_the_plain_sweep_of_inputs_in_that_order(masked, block, monkeypatch):
    monkeypatch.setattr("compress.numerics.sweep.BLOCK", block)
    W, X = random(M, N), rows()
    H, grid = hessian(X), grid_for(W, "channel")
    mask = keep_mask(random(M, N, seed=3).abs(), Pattern.parse("50%")) if masked else None
    order = X.square().mean(0).argsort(descending=True)
    assert order.tolist() != list(range(N))
    found, _ = sweep(W, H, grid=grid, mask=mask, actorder=True)
    permuted = None if mask is None else mask[:, order]
    expected, _ = sweep(W[:, order], hessian(X[:, order]), grid=grid, mask=permuted)
    assert difference(found[:, order], expected) < 1e-10
    assert difference(found, sweep(W, H, grid=grid, mask=mask)[0]) > 1e-3


def descended_slowly(Q: Tensor, W: Tensor, H: Tensor, grid: Grid | None, mask: Tensor | None, rounds: int) -> Tensor:
    """Each weight in turn at the minimum of a parabola through three values of the error, or at the grid's best."""
    Q = Q.clone()
    for _, j, i in itertools.product(range(rounds), range(W.shape[1]), range(W.shape[0])):
        if mask is not None and not mask[i, j]:
            Q[i, j] = 0
            continue

        def error_at(value: float, i: int = i, j: int = j) -> float:
            row = W[i] - Q[i]
            row[j] = W[i, j] - value
            return float(row @ H @ row)

        below, at, above = (error_at(value) for value in (-1.0, 0.0, 1.0))
        best = (below - above) / (2 * (below - 2 * at + above))
        values = [best] if grid is None else (every_code(grid) * grid.step[i, j // grid.group_size]).tolist()
        Q[i, j] = min(values, key=error_at)
    return Q


def every_code(grid: Grid) -> Tensor:
    return torch.arange(grid.kind.lowest, grid.kind.highest + 1).double()


@pytest.mark.parametrize(
    ("masked", "group", "block"), [(False, None, 1), (True, 3, 5), (True, None, 128), (False, "channel", 128)]
)
def test_descent_is_one_weight_after_another_at_its_best(masked, group, block, monkeypatch):
    monkeypatch.setattr("compress.numerics.sweep.BLOCK", block)
    W, H = random(2, 8), hessian(rows(8))
    grid, mask = grid_for(W, group), keep_mask(W.abs(), Pattern.parse("2:4")) if masked else None
    start = W if grid is None else grid.nearest(W)
    start = start if mask is None else start * mask
    for rounds in (1, 3):
        found = descend(start, W, H, grid=grid, mask=mask, rounds=rounds)
        assert difference(found, descended_slowly(start, W, H.damped, grid, mask, rounds)) < 1e-8


def finite_and_no_worse(W: Tensor, X: Tensor) -> None:
    """The outputs on the text are no worse than with rounding to nearest of what the same mask leaves."""
    H = hessian(X)
    grids = [make_grid(W, args_of(3, group), method="absmax") for group in (N, 8)]
    for text, grid in itertools.product(PATTERNS, grids):
        found, mask = sweep(W, H, grid=grid, pattern=parsed(text))
        found = descend(found, W, H, grid=grid, mask=mask, rounds=2)
        plain = grid.nearest(W if mask is None else W * mask)
        assert torch.isfinite(found).all()
        assert torch.equal(grid.nearest(found), found)
        assert error(W, found, H.damped) <= error(W, plain, H.damped) * (1 + 1e-12)


def test_fewer_tokens_than_inputs():
    finite_and_no_worse(random(M, N), rows(count=6))


@pytest.mark.parametrize(("actorder", "fault"), [(False, float("nan")), (True, float("inf"))])
def test_an_error_names_the_linear(fault, actorder):
    H = Hessian(hessian(rows()).second * fault, DAMPING, WHERE)
    with pytest.raises(NumericalError) as raised:
        sweep(random(M, N), H, actorder=actorder)
    assert str(raised.value).startswith(f"The second moment of the inputs of {WHERE} has no Cholesky factor: ")


def test_the_hessians_parts_are_what_they_say():
    X = rows()
    H = hessian(X)
    damped = X.T @ X / len(X)
    damped = damped + DAMPING * damped.diagonal().mean() * torch.eye(N).double()
    assert difference(H.damped, damped) < 1e-12
    for U, order in ((H.inverse_root, torch.arange(N)), (H.ordered_inverse_root, H.order)):
        assert torch.equal(U, U.triu())
        assert difference(U.T @ U @ damped[order][:, order], torch.eye(N).double()) < 1e-9
    assert (X.square().sum(0)[H.order].diff() <= 0).all()
    values, Q = H.scaled_eigen(torch.float64)
    G = Q @ torch.diag(values) @ Q.T
    assert difference(G.diagonal(), torch.ones(N).double()) < 1e-12
    assert difference(torch.diag(H.scale) @ G @ torch.diag(H.scale), damped) < 1e-12
