"""Low-rank factors against their papers' formulas, written out from the rows themselves, and against other factors."""

import re

import pytest
import torch
from torch import Tensor

from compress.errors import NumericalError
from compress.numerics.lowrank import (
    LARGEST_ENTRY,
    Factors,
    Metric,
    asvd,
    gradient_metric,
    output_energies,
    pivoted,
    svd,
    svd_llm,
    weighted,
)
from matrices import difference, measured, random, rows

WHERE = "block 3 mlp.down_proj"
WIDE, TALL, SQUARE = (5, 9), (9, 5), (6, 6)
SHAPES = {"m < n": WIDE, "m > n": TALL, "m = n": SQUARE}
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def covariance(Y: Tensor) -> Tensor:
    """Centered row by row."""
    total = torch.zeros(Y.shape[1], Y.shape[1]).double()
    for y in Y - Y.mean(0):
        total += torch.outer(y, y)
    return total / len(Y)


def top(C: Tensor, rank: int) -> Tensor:
    values, vectors = torch.linalg.eigh(C)
    return vectors[:, values.argsort(descending=True)[:rank]]


def outputs(X: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    return X @ W.T if bias is None else X @ W.T + bias


def given(factors: Factors, X: Tensor) -> Tensor:
    return outputs(X @ factors.A.T, factors.B, factors.bias)


def loss(factors: Factors, X: Tensor, W: Tensor, bias: Tensor | None, L: Tensor | None = None) -> float:
    """E ||L^T (y - y')||^2, row by row."""
    error = outputs(X, W, bias) - given(factors, X)
    return sum(float((e if L is None else L.T @ e).square().sum()) for e in error) / len(X)


def is_of_rank(factors: Factors, rank: int, shape: tuple[int, int]) -> bool:
    return factors.B.shape == (shape[0], rank) and factors.A.shape == (rank, shape[1])


def ranks(shape: tuple[int, int]) -> range:
    return range(1, min(shape) + 1)


@EVERY_SHAPE
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_asvd_is_the_svd_of_the_scaled_weight(alpha, shape):
    W, mean_abs = random(*shape), measured(rows(shape[1])).mean_abs
    D = torch.diag(mean_abs**alpha)
    for rank in ranks(shape):
        U, S, Vh = torch.linalg.svd(W @ D, full_matrices=False)
        expected = U[:, :rank] @ torch.diag(S[:rank]) @ Vh[:rank] @ torch.linalg.inv(D)
        found = asvd(W, mean_abs, rank, alpha=alpha)
        assert is_of_rank(found, rank, shape)
        assert difference(found.product, expected) < 1e-12
        assert float(((W - found.product) @ D).square().sum()) == pytest.approx(
            float(S[rank:].square().sum()), rel=1e-10, abs=1e-20
        )
    assert alpha == 0 or difference(asvd(W, mean_abs, 2, alpha=alpha).product, svd(W, 2).product) > 1e-3


def whitened(W: Tensor, S: Tensor, rank: int) -> Tensor:
    """The paper's three steps: W S, cut, times the inverse."""
    U, sigma, Vh = torch.linalg.svd(W @ S, full_matrices=False)
    return U[:, :rank] @ torch.diag(sigma[:rank]) @ Vh[:rank] @ torch.linalg.inv(S)


@EVERY_SHAPE
def test_svd_llm_is_its_papers_and_the_root_does_not_matter(shape):
    W, second = random(*shape), measured(rows(shape[1])).second
    values, vectors = torch.linalg.eigh(second)
    roots = [torch.linalg.cholesky(second), vectors @ torch.diag(values.sqrt())]
    for rank in ranks(shape):
        found = svd_llm(W, second, rank, name=WHERE)
        assert is_of_rank(found, rank, shape)
        assert found.bias is None
        for S in roots:
            assert difference(found.product, whitened(W, S, rank)) < 1e-9


def test_inputs_that_are_all_zero_are_named():
    message = f"The inputs of {WHERE} are all zero. Calibrate on other text."
    with pytest.raises(NumericalError, match=f"^{re.escape(message)}$"):
        svd_llm(random(5, 9), torch.zeros(9, 9).double(), 2, name=WHERE)


def lord_of_rows(X: Tensor, W: Tensor, bias: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """The paper's formulas on the outputs themselves: the product and the bias."""
    m = len(W)
    b = torch.zeros(m).double() if bias is None else bias
    Y = torch.stack([W @ x + b for x in X])
    U = top(covariance(Y), rank)
    kept = U @ U.T
    return kept @ W, kept @ b + (torch.eye(m).double() - kept) @ Y.mean(0)


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@EVERY_SHAPE
def test_lord_is_its_formula(shape, has_bias):
    W, X = random(*shape), rows(shape[1])
    b = random(shape[0], seed=3) if has_bias else None
    for rank in ranks(shape):
        found = weighted(W, b, measured(X), rank, name=WHERE)
        product, bias = lord_of_rows(X, W, b, rank)
        assert is_of_rank(found, rank, shape)
        assert difference(found.product, product) < 1e-9
        assert difference(found.bias, bias) < 1e-9
        assert difference(found.B.T @ found.B, torch.eye(rank).double()) < 1e-12


def blended(G: Tensor, weight: float) -> Tensor:
    return (1 - weight) * torch.eye(len(G)).double() + weight * G / (G.trace() / len(G))


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.999])
def test_the_metric_is_the_blend_of_identity_and_gradient(weight):
    G = covariance(random(3, 6, seed=4))  # fewer tokens than outputs
    full, diagonal = gradient_metric(G, weight, name=WHERE), gradient_metric(G.diagonal(), weight, name=WHERE)
    assert difference(full.L @ full.L.T, blended(G, weight)) < 1e-12
    assert torch.equal(full.L, full.L.tril())
    assert diagonal.L.shape == (6,)
    assert difference(torch.diag(diagonal.L**2), blended(torch.diag(G.diagonal()), weight)) < 1e-12
    alike = gradient_metric(torch.diag(G.diagonal()), weight, name=WHERE)
    assert difference(torch.diag(diagonal.L), alike.L) < 1e-12


METRICS = ["none", "full", "diagonal"]


def metric_of(kind: str, m: int) -> tuple[Metric | None, Tensor]:
    """And its L in full."""
    if kind == "none":
        return None, torch.eye(m).double()
    mix = random(m, m, seed=5) @ torch.diag(torch.logspace(0, -1, m).double())
    G = covariance(random(40, m, seed=4) @ mix)
    metric = gradient_metric(G if kind == "full" else G.diagonal(), 0.95, name=WHERE)
    return metric, metric.L if kind == "full" else torch.diag(metric.L)


@pytest.mark.parametrize("kind", METRICS)
@EVERY_SHAPE
def test_what_is_lost_is_the_rest_of_the_whitened_singular_values(shape, kind):
    W, b, X = random(*shape), random(shape[0], seed=3), rows(shape[1])
    metric, L = metric_of(kind, shape[0])
    S = torch.linalg.cholesky(covariance(X))
    U, sigma, Vh = torch.linalg.svd(L.T @ W @ S, full_matrices=False)
    for rank in ranks(shape):
        found = weighted(W, b, measured(X), rank, metric, name=WHERE)
        cut = U[:, :rank] @ torch.diag(sigma[:rank]) @ Vh[:rank]
        expected = torch.linalg.inv(L.T) @ cut @ torch.linalg.inv(S)
        assert difference(found.product, expected) < 1e-9
        assert loss(found, X, W, b, L) == pytest.approx(float(sigma[rank:].square().sum()), rel=1e-9, abs=1e-18)


@pytest.mark.parametrize("centered", [True, False], ids=["centered", "uncentered"])
@EVERY_SHAPE
def test_energies_are_the_outputs_eigenvalues(shape, centered):
    W, b, X = random(*shape), random(shape[0], seed=3), rows(shape[1])
    Y = outputs(X, W, b if centered else None)
    C = covariance(Y) if centered else sum(torch.outer(y, y) for y in Y) / len(Y)
    found = output_energies(W, measured(X).spread(centered=centered))
    expected = torch.linalg.eigvalsh(C).flip(0)
    assert found.shape == (min(shape),)
    assert difference(found, expected[: min(shape)]) < 1e-10
    assert expected[min(shape) :].abs().sum() < 1e-10


def restored(factors: Factors) -> Tensor:
    """What the pivots and the others give together."""
    split = pivoted(factors)
    W = torch.full((factors.B.shape[0], factors.A.shape[1]), torch.nan, dtype=torch.float64)
    W[split.rows] = split.A
    W[split.others] = split.C @ split.A
    return W


FORMS = {"m > r": (12, 7, 4), "r = 1": (6, 5, 1), "r = m": (5, 9, 5), "r = m - 1": (5, 9, 4), "all one": (1, 1, 1)}


@pytest.mark.parametrize(("m", "n", "rank"), FORMS.values(), ids=FORMS)
def test_pivots_are_the_same_function_in_fewer_numbers(m, n, rank):
    for seed in range(20):
        factors = Factors(random(m, rank, seed=seed), random(rank, n, seed=seed + 1), None)
        split = pivoted(factors)
        assert difference(restored(factors), factors.product) < 1e-10
        assert difference(split.A, factors.product[split.rows]) < 1e-12
        assert split.C.shape == (m - rank, rank)
        assert split.A.numel() + split.C.numel() == rank * (m + n - rank)
        assert split.C.numel() == 0 or split.C.abs().max() <= LARGEST_ENTRY
        chosen, others = split.rows.tolist(), split.others.tolist()
        assert chosen == sorted(chosen)
        assert others == sorted(others)
        assert sorted(chosen + others) == list(range(m))
        assert len(chosen) == rank


def unlucky(rank: int) -> Tensor:
    """On which partial pivoting exchanges nothing, and the entries of C double from column to column."""
    lower = torch.eye(rank).double() - torch.ones(rank, rank).double().tril(-1)
    return torch.cat([lower, -torch.ones(2, rank).double(), 0.5 * lower.flip(0)])


def test_entries_are_small_where_partial_pivoting_leaves_them_large():
    B = unlucky(12)
    by_partial_pivoting = torch.linalg.solve(B[:12].T, B.T).T
    assert by_partial_pivoting.abs().max() > 1000
    factors = Factors(B, random(12, 8), None)
    split = pivoted(factors)
    assert split.C.abs().max() <= LARGEST_ENTRY
    assert split.rows.tolist() != list(range(12))
    assert difference(restored(factors), factors.product) < 1e-10


def dependent(kind: str) -> Tensor:
    B = random(8, 3)
    if kind == "a zero column":
        B[:, 1] = 0
    elif kind == "a sum of columns":
        B[:, 2] = B[:, 0] + B[:, 1]
    elif kind == "two rows":
        B[2:] = 0
    elif kind == "square":
        B = torch.ones(4, 4).double()
    elif kind == "below the least normal number":
        B[:, 2] *= 1e-320
    else:
        B[2, 1] = float(kind)
    return B


DEPENDENT = ["a zero column", "a sum of columns", "two rows", "square"]
STUCK = ["below the least normal number", "nan"]


@pytest.mark.timeout(1)
@pytest.mark.parametrize("kind", [*DEPENDENT, *STUCK])
def test_without_independent_rows_there_are_no_pivots(kind):
    B = dependent(kind)
    with pytest.raises(NumericalError, match="fewer independent rows"):
        pivoted(Factors(B, random(B.shape[1], 5), None))


@pytest.mark.parametrize(("place", "fault"), [("weight", float("inf")), ("moments of an input", float("nan"))])
@pytest.mark.parametrize("method", ["lord", "weighted", "svd_llm"])
def test_no_number_is_an_error_that_names_the_place(method, place, fault):
    shape = TALL
    W, X = random(*shape), rows(shape[1])
    moments = measured(X)
    if place == "weight":
        W[2, 3] = fault
    else:
        moments.second[2] = moments.second[:, 2] = fault
        moments.mean[2] = fault
    metric = gradient_metric(covariance(random(40, shape[0])), 0.9, name=WHERE)
    methods = {
        "lord": lambda: weighted(W, None, moments, 2, name=WHERE),
        "weighted": lambda: weighted(W, None, moments, 2, metric, name=WHERE),
        "svd_llm": lambda: svd_llm(W, moments.second, 2, name=WHERE),
    }
    with pytest.raises(NumericalError, match=WHERE) as error:
        methods[method]()
    assert "all zero. Calibrate" not in str(error.value)
