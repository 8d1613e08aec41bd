"""Ridge regression from second moments against the rows themselves, stacked one below the other."""

import itertools
import re
from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import Tensor

import oracles
from compress.errors import NumericalError
from compress.numerics.ridge import DAMPINGS, RANGE, NormalEquations, choose_damping, excess, ridge
from matrices import random

EVERY = (RANGE[0], *DAMPINGS, RANGE[1])
K, M, ROWS = 7, 5, 40
WHERE = "block 3 mlp writers"


def equations(U: Tensor, T: Tensor, weights: Tensor | None = None) -> NormalEquations:
    """Token by token, as the sums are defined."""
    weights = torch.ones(len(U), dtype=torch.float64) if weights is None else weights
    G, B = torch.zeros(U.shape[1], U.shape[1]).double(), torch.zeros(U.shape[1], T.shape[1]).double()
    for u, t, weight in zip(U, T, weights, strict=True):
        G += weight * torch.outer(u, u)
        B += weight * torch.outer(u, t)
    return NormalEquations(G, B, float(weights.sum()))


def least_squares(U: Tensor, T: Tensor) -> Tensor:
    return torch.linalg.lstsq(U, T, driver="gelsd").solution


def stacked(U: Tensor, T: Tensor, W0: Tensor, damping: float) -> Tensor:
    """min ||U W - T||^2 + l ||W - W0||^2 as one least-squares problem of ROWS + K rows."""
    root = (damping * U.square().sum(0).mean()).sqrt()
    return least_squares(torch.cat([U, root * torch.eye(U.shape[1]).double()]), torch.cat([T, root * W0]))


def problem(seed: int = 0, noise: float = 0.5, truth: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated inputs of unlike sizes; targets that a matrix near W0 explains in part."""
    U = random(ROWS, K, seed=seed) @ (random(K, K, seed=90) @ torch.diag(torch.logspace(0, -1, K).double()))
    W0 = random(K, M, seed=91)
    truth = W0 + random(K, M, seed=92) if truth is None else truth
    return U, U @ truth + noise * random(ROWS, M, seed=seed + 100), W0


@pytest.mark.parametrize("rows", [ROWS, K - 3], ids=["enough rows", "fewer rows than inputs"])
@pytest.mark.parametrize("damping", EVERY)
def test_it_is_the_stacked_least_squares_problem(damping, rows):
    U, T, W0 = problem()
    U, T = U[:rows], T[:rows]
    found = ridge(equations(U, T), W0, damping, name=WHERE)
    assert (found - stacked(U, T, W0, damping)).abs().max() < 1e-9
    assert (found - W0).abs().max() > 1e-3


def mean_error(U: Tensor, T: Tensor, W: Tensor, S: Tensor) -> float:
    """Row by row."""
    return sum(float(((u @ W - t) @ S).square().sum()) for u, t in zip(U, T, strict=True)) / len(U)


@pytest.mark.parametrize("metric", [False, True], ids=["plain", "in a metric"])
def test_excess_is_the_mean_error_but_for_a_constant(metric):
    U, T, W0 = problem()
    S = random(M, 3, seed=5) if metric else torch.eye(M).double()
    given = S @ S.T if metric else None
    nothing = mean_error(U, T, torch.zeros(K, M).double(), S)
    for W in (W0, least_squares(U, T), torch.zeros(K, M).double()):
        expected = mean_error(U, T, W, S) - nothing
        assert excess(equations(U, T), W, given) == pytest.approx(expected, rel=1e-10, abs=1e-10)


def problems(noises: Iterable[float], count: int = 4) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Rows to fit on, rows held out and W0: the more noise, the larger the best damping."""
    for seed, noise in itertools.product(range(count), noises):
        U, T, W0 = problem(seed=seed, noise=noise)
        yield U, T, *problem(seed=seed + 10, noise=noise)[:2], W0


@pytest.mark.parametrize("metric", [False, True], ids=["plain", "in a metric"])
def test_the_damping_is_the_one_that_is_best_on_what_was_held_out(metric):
    """By brute force from the rows, for noises whose best damping is now small, now large."""
    S = random(M, 3, seed=5) if metric else torch.eye(M).double()
    chosen = []
    for U, T, V, R, W0 in problems((0.01, 3.0, 20.0, 500.0)):

        def solved(damping: float | None, U: Tensor = U, T: Tensor = T, W0: Tensor = W0) -> Tensor:
            return W0 if damping is None else stacked(U, T, W0, damping)

        expected = oracles.best_damping(lambda damping, V=V, R=R, solved=solved: mean_error(V, R, solved(damping), S))
        given = S @ S.T if metric else None
        found = choose_damping(equations(U, T), equations(V, R), W0, name=WHERE, metric=given)
        assert (found and found.damping) == expected
        assert found is None or (found.W - solved(found.damping)).abs().max() < 1e-9
        chosen.append(expected)
    assert None in chosen
    assert len(set(chosen)) >= 4, chosen


@pytest.mark.parametrize(("fault", "call"), [("nan", ridge), ("inf", choose_damping), ("zero", ridge)])
def test_an_error_names_the_place(call, fault):
    U, T, W0 = problem()
    if fault == "zero":
        U = torch.zeros_like(U)
    else:
        U[3, 2] = float(fault)
    sums = equations(U, T)
    arguments = (sums, W0, 0.1) if call is ridge else (sums, sums, W0)
    message = (
        f"The second moment of the inputs of {WHERE} has no Cholesky factor: a NaN, an Inf or inputs that are all "
        "zero. Check the weights before it, or calibrate on more text."
    )
    with pytest.raises(NumericalError, match=f"^{re.escape(message)}$"):
        call(*arguments, name=WHERE)


@pytest.mark.parametrize("place", ["fit targets", "held out inputs", "held out targets"])
def test_no_choice_is_made_by_what_is_no_number(place):
    """Comparisons with a NaN are false, all of them: unlooked at, it would pass for a fit that is no better."""
    U, T, W0 = problem()
    fit, held_out = equations(U, T), equations(U, T)
    broken = {"fit targets": fit.B, "held out inputs": held_out.G, "held out targets": held_out.B}[place]
    broken[3, 2] = float("nan")
    with pytest.raises(NumericalError, match=WHERE):
        choose_damping(fit, held_out, W0, name=WHERE)
