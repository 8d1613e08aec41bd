"""Optimal Brain Surgeon on units against trying every unit and solving what is left exactly."""

import argparse
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import compress
from compress.datasets.windows import cut, encode
from compress.errors import NumericalError
from compress.models.loading import load_tokenizer
from compress.numerics import obs
from compress.numerics.obs import compensated, elimination, prune_units
from matrices import random

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


def one_by_one(W: Tensor, G: Tensor, down_to: int) -> tuple[list[int], list[float]]:
    """Rows in the order in which they go, and what the loss has risen by: the formula, all of G^-1 and W every time."""
    W, inverse, left = W.clone(), torch.linalg.inv(G), torch.ones(len(W), dtype=torch.bool)
    order, costs = [], []
    while int(left.sum()) > down_to:
        rises = (W.square().sum(1) / inverse.diagonal()).masked_fill(~left, torch.inf)
        row = int(rises.argmin())
        column = inverse[:, row] / inverse[row, row]
        W, inverse = W - torch.outer(column, W[row]), inverse - torch.outer(column, inverse[row])
        left[row] = False
        inverse[row, row] = 1
        order.append(row)
        costs.append(float(rises[row]))
    return order, torch.tensor(costs).double().cumsum(0).tolist()


@pytest.fixture(scope="module")
def demo() -> tuple[Tensor, Tensor]:
    """W and G of the down projection in the middle of the demo model, on Python source text."""
    folder = Path(compress.__file__).parent / "assets/demo"
    windows = cut(encode(load_tokenizer(folder), inspect.getsource(argparse)), 128)[:24]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    linear, inputs = model.model.decoder.layers[2].fc2, []
    linear.register_forward_pre_hook(lambda _module, given: inputs.append(given[0].flatten(0, -2).double()))
    with torch.no_grad():
        model(windows)
    return linear.weight.detach().double().T, inputs[0].T @ inputs[0]


def test_a_trained_models_neurons_go_as_one_by_one(demo):
    """Over many applied updates, in the same order and at the same cost: half of what the smallest rows cost."""
    W, G = demo
    exact, units = damped(G), torch.arange(len(W))[:, None]
    keep = len(W) // 2
    found = elimination(W, G, units, keep, damping=DAMPING, name=WHERE)
    order, costs = one_by_one(W, exact, keep)
    assert len(order) > 4 * obs.PENDING
    assert found.order.tolist() == order
    assert found.costs.tolist() == pytest.approx(costs, rel=1e-7)
    left = compensated(W, G, units, found.kept(keep), damping=DAMPING, name=WHERE)
    assert error(W, left, exact) == pytest.approx(costs[-1], rel=1e-7)
    small = W.square().sum(1).argsort()[:keep]
    assert costs[-1] < error(W, without(W, exact, small), exact) / 2


@pytest.mark.parametrize("fault", [0.0, float("nan"), float("inf")])
def test_an_error_names_the_place(fault):
    W, G, units = problem(3, 6)
    with pytest.raises(NumericalError) as raised:
        prune_units(W, G * fault, units, 2, damping=DAMPING, name=WHERE)
    assert str(raised.value).startswith(f"The second moment of the inputs of {WHERE} has no Cholesky factor: ")
