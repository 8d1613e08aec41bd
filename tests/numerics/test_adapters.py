"""Adapters against decompositions written out, and against other adapters."""

import itertools
import re

import pytest
import torch
from torch import Tensor

from compress.errors import NumericalError
from compress.numerics.lowrank import Factors, fit_adapter
from matrices import cut, difference, measured, random, rows

WHERE = "block 3 mlp.down_proj"
SHAPES = {"m < n": (5, 9), "m > n": (9, 5), "m = n": (6, 6)}
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
EVERY_CENTRING = pytest.mark.parametrize("centered", [False, True], ids=["about 0", "about the mean"])


def fitted(method: str, E: Tensor, X: Tensor, rank: int, *, centered: bool = False) -> Factors:
    return fit_adapter(method, E, measured(X), rank, centered=centered, name=WHERE)  # type: ignore[arg-type]


def loss(E: Tensor, product: Tensor, X: Tensor) -> float:
    """E ||(E - B A) x||^2, row by row."""
    return sum(float(((E - product) @ x).square().sum()) for x in X) / len(X)


def ranks(shape: tuple[int, int]) -> range:
    return range(1, min(shape) + 1)


@EVERY_SHAPE
def test_naive_is_the_nearest_in_weights(shape):
    E, X = random(*shape), rows(shape[1])
    for rank in ranks(shape):
        found = fitted("naive", E, X, rank)
        assert found.bias is None
        assert found.B.shape == (shape[0], rank)
        assert found.A.shape == (rank, shape[1])
        assert difference(found.product, cut(E, rank)) < 1e-12


@EVERY_SHAPE
def test_slim_is_the_papers_algorithm(shape):
    """E by the inputs' mean |x|, shifted by the least; its SVD; and the inputs' sizes divided out again."""
    E, X = random(*shape), rows(shape[1])
    mean_abs = torch.stack([sum((x[j].abs() for x in X), torch.zeros(()).double()) / len(X) for j in range(shape[1])])
    x = mean_abs + mean_abs.min()
    for rank in ranks(shape):
        found = fitted("slim", E, X, rank)
        expected = cut(E @ torch.diag(x), rank) @ torch.linalg.inv(torch.diag(x))
        assert found.bias is None
        assert found.B.shape == (shape[0], rank)
        assert found.A.shape == (rank, shape[1])
        assert difference(found.product, expected) < 1e-10


def test_slim_with_dead_inputs_shifts_by_the_least_that_moves():
    """SLiM's own x + min x stays 0 there, and its diagonal has no inverse."""
    E, X = random(5, 9), rows(9, dead=(1, 4))
    mean_abs = X.abs().mean(0)
    least = min(float(x) for x in mean_abs if x > 0)
    x = mean_abs + least
    assert x[1] == x[4] == least
    for rank in range(1, 6):
        found = fitted("slim", E, X, rank)
        assert torch.isfinite(found.product).all()
        assert difference(found.product, cut(E * x, rank) / x) < 1e-10


@EVERY_CENTRING
@EVERY_SHAPE
def test_whitened_is_the_formula_by_any_root(shape, centered):
    """The SVD of E R with R R^T the inputs' second moment, or covariance, and R divided out again."""
    E, X = random(*shape), rows(shape[1])
    C = (X - X.mean(0)).T @ (X - X.mean(0)) / len(X) if centered else X.T @ X / len(X)
    values, Q = torch.linalg.eigh(C)
    for R in (torch.linalg.cholesky(C), Q @ torch.diag(values.sqrt()), Q @ torch.diag(values.sqrt()) @ Q.T):
        for rank in ranks(shape):
            found = fitted("whitened", E, X, rank, centered=centered)
            assert difference(found.product, cut(E @ R, rank) @ torch.linalg.inv(R)) < 1e-8


@EVERY_SHAPE
def test_whitened_about_the_mean_keeps_it_by_the_bias_and_loses_least_of_all(shape):
    E, X = random(*shape), rows(shape[1])
    for rank in ranks(shape):
        found = fitted("whitened", E, X, rank, centered=True)
        missed = X @ E.T - (X @ found.product.T + found.bias)
        assert float(missed.mean(0).abs().max()) < 1e-12
        least = float(missed.square().sum()) / len(X)
        assert least <= loss(E, fitted("whitened", E, X, rank).product, X) + 1e-12
        center = X - X.mean(0)
        for method in ("naive", "slim", "whitened"):
            assert loss(E, fitted(method, E, X, rank).product, center) >= least - 1e-12


def test_fewer_tokens_than_inputs():
    """As many directions as there are tokens take up all that the outputs miss; fewer are still the best."""
    E, X = random(9, 12), rows(12, count=4)
    assert loss(E, fitted("whitened", E, X, 4).product, X) < 1e-20
    for rank, method in itertools.product((1, 2, 3), ("naive", "slim")):
        least = loss(E, fitted("whitened", E, X, rank).product, X)
        assert 0 < least <= loss(E, fitted(method, E, X, rank).product, X)


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_whitened_names_the_linear_whose_inputs_are_not_finite(fault):
    moments = measured(rows(9))
    moments.second[2, 2] = fault
    message = f"{WHERE} or its inputs have a NaN or Inf. Check the weights before it and the text."
    with pytest.raises(NumericalError, match=f"^{re.escape(message)}$"):
        fit_adapter("whitened", random(5, 9), moments, 2, centered=False, name=WHERE)
