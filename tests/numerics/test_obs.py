"""Optimal Brain Surgeon on units against trying every unit and solving what is left exactly."""

import pytest
import torch
from torch import Tensor

from compress.errors import NumericalError
from compress.numerics import obs
from compress.numerics.obs import elimination
from matrices import prune_units, random

M, ROWS = 4, 60
WHERE = "block 3 mlp writers"
DAMPING = 1e-3


def problem(size: int, count: int, *, others: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """W, G and `count` units of `size` rows, scattered; `others` rows are in no unit. Inputs are correlated."""
    k = size * count + others
    U = random(ROWS, k, seed=seed) @ (torch.eye(k).double() + 0.7 * random(k, k, seed=seed + 50) / k**0.5)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    return random(k, M, seed=seed + 99), U.T @ U / ROWS, order[: size * count].view(count, size)


def damped(G: Tensor) -> Tensor:
    return G + DAMPING * G.diagonal().mean() * torch.eye(len(G)).double()


def error(W: Tensor, other: Tensor, G: Tensor) -> float:
    """Column by column, (w - w')^T G (w - w')."""
    return sum(float(d @ G @ d) for d in (W - other).T)


def without(W: Tensor, G: Tensor, gone: Tensor) -> Tensor:
    """The best matrix whose `gone` rows are zero: dE/dW' = 0 in all other rows, solved as a system of equations."""
    rest = torch.tensor([row for row in range(len(W)) if row not in gone.tolist()])
    best = torch.zeros_like(W)
    best[rest] = torch.linalg.solve(G[rest][:, rest], G[rest] @ W)
    return best


def greedy(W: Tensor, G: Tensor, units: Tensor, keep: int) -> tuple[list[int], Tensor]:
    """Unit after unit: each that is left is tried, all other rows solved again, the cheapest goes."""
    left, now = list(range(len(units))), W
    while len(left) > keep:
        trials = {}
        for unit in left:
            gone = [*(set(range(len(units))) - set(left)), unit]
            trials[unit] = without(W, G, units[gone].flatten())
        cheapest = min(trials, key=lambda unit: error(W, trials[unit], G))
        left.remove(cheapest)
        now = trials[cheapest]
    return left, now


@pytest.fixture
def _few_pending(monkeypatch):
    """Small problems too have their updates applied in the middle, and in the middle of a unit."""
    monkeypatch.setattr(obs, "PENDING", 4)


@pytest.mark.usefixtures("_few_pending")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("size", "count"), [(1, 9), (3, 6), (2, 5)])
def test_every_step_is_the_best_one(size, count, seed):
    W, G, units = problem(size, count, seed=seed)
    for keep in range(count):
        kept, found = prune_units(W, G, units, keep, damping=DAMPING, name=WHERE)
        left, expected = greedy(W, damped(G), units, keep)
        assert kept.tolist() == left
        assert (found - expected).abs().max() < 1e-9


@pytest.mark.usefixtures("_few_pending")
@pytest.mark.parametrize(("size", "count"), [(1, 9), (3, 6), (2, 5)])
def test_one_elimination_gives_every_count_and_its_cost(size, count):
    W, G, units = problem(size, count)
    found = elimination(W, G, units, 0, damping=DAMPING, name=WHERE)
    assert sorted(found.order.tolist()) == list(range(count))
    for keep in range(count):
        removed = count - keep
        partly = elimination(W, G, units, keep, damping=DAMPING, name=WHERE)
        assert torch.equal(partly.order, found.order[:removed])
        assert torch.equal(partly.costs, found.costs[:removed])
        assert found.kept(keep).tolist() == sorted(found.order[removed:].tolist())
        best = without(W, damped(G), units[found.order[:removed]].flatten())
        assert float(found.costs[removed - 1]) == pytest.approx(error(W, best, damped(G)), rel=1e-9)


@pytest.mark.parametrize("fault", [0.0, float("nan"), float("inf")])
def test_an_error_names_the_place(fault):
    W, G, units = problem(3, 6)
    with pytest.raises(NumericalError) as raised:
        prune_units(W, G * fault, units, 2, damping=DAMPING, name=WHERE)
    assert str(raised.value).startswith(f"The second moment of the inputs of {WHERE} has no Cholesky factor: ")
