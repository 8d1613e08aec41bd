"""Adapters against decompositions written out, and against other adapters."""

import itertools
import re

import pytest
import torch
from torch import Tensor

from compress.errors import NumericalError
from compress.numerics.adapters import fit_adapter
from compress.numerics.lowrank import Factors, InputMoments

WHERE = "block 3 mlp.down_proj"
TOKENS = 60
SHAPES = {"m < n": (5, 9), "m > n": (9, 5), "m = n": (6, 6)}
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
EVERY_CENTRING = pytest.mark.parametrize("centred", [False, True], ids=["about 0", "about the mean"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rows(n: int, *, count: int = TOKENS, seed: int = 0, dead: tuple[int, ...] = ()) -> Tensor:
    """Correlated inputs of unlike sizes, whose means are not zero."""
    X = random(count, n, seed=seed) @ random(n, n, seed=seed + 1) @ torch.diag(torch.logspace(0, -1, n).double())
    X = X + random(n, seed=seed + 2)
    X[:, list(dead)] = 0
    return X


def measured(X: Tensor) -> InputMoments:
    return InputMoments(X.T @ X / len(X), X.mean(0), X.abs().mean(0))


def fitted(method: str, E: Tensor, X: Tensor, rank: int, *, centred: bool = False) -> Factors:
    return fit_adapter(method, E, measured(X), rank, centred=centred, name=WHERE)  # type: ignore[arg-type]


def cut(M: Tensor, rank: int) -> Tensor:
    """The SVD's first `rank` parts, one by one."""
    U, S, Vh = torch.linalg.svd(M)
    return sum((S[i] * torch.outer(U[:, i], Vh[i]) for i in range(rank)), torch.zeros_like(M))


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


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


@EVERY_SHAPE
def test_slim_loses_least_of_the_weights_by_their_inputs_sizes(shape):
    E, X = random(*shape), rows(shape[1])
    x = X.abs().mean(0) + X.abs().mean(0).min()
    for rank in ranks(shape):
        least = float(((E - fitted("slim", E, X, rank).product) * x).square().sum())
        for seed in range(20):
            A = random(rank, shape[1], seed=seed) * x
            other = (E * x) @ torch.linalg.pinv(A) @ A
            assert float((E * x - other).square().sum()) >= least - 1e-12


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


@pytest.mark.parametrize("scale", [1e-8, 1e8])
@pytest.mark.parametrize("method", ["naive", "slim", "whitened"])
def test_the_size_of_all_inputs_does_not_matter(method, scale):
    E, X = random(5, 9), rows(9)
    assert difference(fitted(method, E, X, 2).product, fitted(method, E, scale * X, 2).product) < 1e-9


@EVERY_CENTRING
@EVERY_SHAPE
def test_whitened_is_the_formula_by_any_root(shape, centred):
    """The SVD of E R with R R^T the inputs' second moment, or covariance, and R divided out again."""
    E, X = random(*shape), rows(shape[1])
    C = (X - X.mean(0)).T @ (X - X.mean(0)) / len(X) if centred else X.T @ X / len(X)
    values, Q = torch.linalg.eigh(C)
    for R in (torch.linalg.cholesky(C), Q @ torch.diag(values.sqrt()), Q @ torch.diag(values.sqrt()) @ Q.T):
        for rank in ranks(shape):
            found = fitted("whitened", E, X, rank, centred=centred)
            assert difference(found.product, cut(E @ R, rank) @ torch.linalg.inv(R)) < 1e-8


@EVERY_SHAPE
def test_whitened_loses_least_of_the_outputs(shape):
    """Than the other two, than itself moved in any direction, and than the best B for any other A."""
    E, X = random(*shape), rows(shape[1])
    for rank in ranks(shape):
        found = fitted("whitened", E, X, rank)
        least = loss(E, found.product, X)
        assert found.bias is None
        for method in ("naive", "slim"):
            assert loss(E, fitted(method, E, X, rank).product, X) >= least - 1e-12
        for seed, size in itertools.product(range(10), (1e-3, 1e-1)):
            B = found.B + size * random(*found.B.shape, seed=seed)
            A = found.A + size * random(*found.A.shape, seed=seed + 100)
            assert loss(E, B @ A, X) >= least - 1e-12
            A = random(rank, shape[1], seed=seed)
            B = torch.linalg.lstsq(X @ A.T, X @ E.T).solution.T
            assert loss(E, B @ A, X) >= least - 1e-9


@EVERY_SHAPE
def test_whitened_about_the_mean_keeps_it_by_the_bias_and_loses_least_of_all(shape):
    E, X = random(*shape), rows(shape[1])
    for rank in ranks(shape):
        found = fitted("whitened", E, X, rank, centred=True)
        assert found.bias is not None
        missed = X @ E.T - (X @ found.product.T + found.bias)
        assert float(missed.mean(0).abs().max()) < 1e-12
        least = float(missed.square().sum()) / len(X)
        assert least <= loss(E, fitted("whitened", E, X, rank).product, X) + 1e-12
        centre = X - X.mean(0)
        for method in ("naive", "slim", "whitened"):
            assert loss(E, fitted(method, E, X, rank).product, centre) >= least - 1e-12


@pytest.mark.parametrize("method", ["naive", "slim", "whitened"])
@pytest.mark.parametrize("dead", [(), (0, 3)], ids=["all move", "dead inputs"])
def test_full_rank_leaves_nothing_of_the_outputs(method, dead):
    for shape in SHAPES.values():
        E, X = random(*shape), rows(shape[1], dead=dead)
        assert loss(E, fitted(method, E, X, min(shape)).product, X) < 1e-20


@pytest.mark.parametrize("method", ["naive", "slim", "whitened"])
def test_nothing_missed_needs_no_adapter(method):
    E, X = torch.zeros(5, 9).double(), rows(9)
    for rank in (1, 3):
        found = fitted(method, E, X, rank)
        assert found.B.shape == (5, rank)
        assert difference(found.product, E) == 0


def test_fewer_tokens_than_inputs():
    """As many directions as there are tokens take up all that the outputs miss; fewer are still the best."""
    E, X = random(9, 12), rows(12, count=4)
    assert loss(E, fitted("whitened", E, X, 4).product, X) < 1e-20
    for rank, method in itertools.product((1, 2, 3), ("naive", "slim")):
        least = loss(E, fitted("whitened", E, X, rank).product, X)
        assert 0 < least <= loss(E, fitted(method, E, X, rank).product, X)


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_slim_names_the_linear_whose_inputs_are_not_finite(fault):
    moments = measured(rows(9))
    moments.mean_abs[3] = fault
    with pytest.raises(NumericalError, match=f"^The inputs of {re.escape(WHERE)} have a NaN or Inf"):
        fit_adapter("slim", random(5, 9), moments, 2, centred=False, name=WHERE)


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_whitened_names_the_linear_whose_inputs_are_not_finite(fault):
    moments = measured(rows(9))
    moments.second[2, 2] = fault
    message = f"{WHERE} or its inputs have a NaN or Inf. Check the weights before it and the text."
    with pytest.raises(NumericalError, match=f"^{re.escape(message)}$"):
        fit_adapter("whitened", random(5, 9), moments, 2, centred=False, name=WHERE)


def test_beside_inputs_that_never_move_slim_is_naive():
    E, X = random(5, 9), torch.zeros(TOKENS, 9).double()
    assert difference(fitted("slim", E, X, 2).product, cut(E, 2)) < 1e-9


def test_inputs_that_are_all_zero_leave_naive_as_it_is_and_whitened_with_outputs_of_zero():
    E, X = random(5, 9), torch.zeros(TOKENS, 9).double()
    assert difference(fitted("naive", E, X, 2).product, cut(E, 2)) < 1e-12
    found = fitted("whitened", E, X, 2)
    assert torch.isfinite(found.product).all()
    assert loss(E, found.product, X) == 0
