"""Low-rank factors against their papers' formulas, written out from the rows themselves, and against other factors."""

import itertools
import math
import re

import pytest
import torch
from torch import Tensor

from compress.errors import NumericalError
from compress.numerics.lowrank import (
    LARGEST_ENTRY,
    Factors,
    InputMoments,
    Metric,
    Spread,
    asvd,
    gradient_metric,
    least_damped_cholesky,
    lord,
    normal_moments,
    orthonormal,
    output_directions,
    output_energies,
    pivoted,
    svd,
    svd_llm,
    weighted,
)

WHERE = "block 3 mlp.down_proj"
ROWS = 60
WIDE, TALL, SQUARE = (5, 9), (9, 5), (6, 6)
SHAPES = {"m < n": WIDE, "m > n": TALL, "m = n": SQUARE}
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rows(n: int, *, count: int = ROWS, seed: int = 0, dead: tuple[int, ...] = ()) -> Tensor:
    """Correlated inputs of unlike sizes, whose means are not zero."""
    X = random(count, n, seed=seed) @ random(n, n, seed=seed + 1) @ torch.diag(torch.logspace(0, -1, n).double())
    X = X + random(n, seed=seed + 2)
    X[:, list(dead)] = 0
    return X


def measured(X: Tensor) -> InputMoments:
    """Row by row, as they are defined."""
    second = torch.zeros(X.shape[1], X.shape[1]).double()
    mean, mean_abs = torch.zeros(X.shape[1]).double(), torch.zeros(X.shape[1]).double()
    for x in X:
        second += torch.outer(x, x) / len(X)
        mean += x / len(X)
        mean_abs += x.abs() / len(X)
    return InputMoments(second, mean, mean_abs)


def covariance(Y: Tensor) -> Tensor:
    """Centred row by row."""
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


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


def is_of_rank(factors: Factors, rank: int, shape: tuple[int, int]) -> bool:
    return factors.B.shape == (shape[0], rank) and factors.A.shape == (rank, shape[1])


def ranks(shape: tuple[int, int]) -> range:
    return range(1, min(shape) + 1)


# ---- the weight alone, and its inputs' sizes ----


@EVERY_SHAPE
def test_svd_is_the_nearest_of_its_rank(shape):
    """Eckart and Young: what is lost is the rest of the singular values."""
    W = random(*shape)
    sigma = torch.linalg.svdvals(W)
    for rank in ranks(shape):
        factors = svd(W, rank)
        assert is_of_rank(factors, rank, shape)
        assert factors.bias is None
        lost = float((W - factors.product).square().sum())
        assert lost == pytest.approx(float(sigma[rank:].square().sum()), rel=1e-10, abs=1e-20)
        for seed in range(20):
            A = random(rank, shape[1], seed=seed)
            nearest = W @ torch.linalg.pinv(A) @ A
            assert float((W - nearest).square().sum()) >= lost - 1e-12


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


def test_asvd_uses_the_papers_exponent():
    W, mean_abs = random(*WIDE), measured(rows(9)).mean_abs
    assert difference(asvd(W, mean_abs, 2).product, asvd(W, mean_abs, 2, alpha=0.5).product) == 0


def test_asvd_gives_an_input_that_never_moves_the_least_scale():
    W, mean_abs = random(*WIDE), measured(rows(9, dead=(1, 4))).mean_abs
    alive = mean_abs.clone()
    alive[[1, 4]] = mean_abs[mean_abs > 0].min()
    assert difference(asvd(W, mean_abs, 3).product, asvd(W, alive, 3).product) < 1e-12
    nothing = torch.zeros(9).double()
    assert difference(asvd(W, nothing, 3).product, svd(W, 3).product) < 1e-12


# ---- SVD-LLM ----


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


@EVERY_SHAPE
def test_uncentred_lord_is_svd_llm(shape):
    W, moments = random(*shape), measured(rows(shape[1]))
    for rank in ranks(shape):
        found = lord(W, None, moments, rank, name=WHERE, centred=False)
        assert found.bias is None
        assert difference(found.product, svd_llm(W, moments.second, rank, name=WHERE).product) < 1e-9


def test_uncentred_leaves_the_bias():
    W, b, moments = random(*WIDE), random(5, seed=3), measured(rows(9))
    found = lord(W, b, moments, 2, name=WHERE, centred=False)
    assert found.bias is not None
    assert torch.equal(found.bias, b)


def test_nothing_is_added_where_a_cholesky_factor_exists():
    second = measured(rows(9)).second
    assert torch.equal(least_damped_cholesky(second, name=WHERE), torch.linalg.cholesky(second))


@pytest.mark.parametrize(("count", "dead"), [(ROWS, (1, 4)), (4, ())], ids=["dead inputs", "fewer tokens than inputs"])
@EVERY_SHAPE
def test_svd_llm_finds_a_way_where_inputs_are_no_basis(shape, count, dead):
    """What is added to the diagonal is so little that the loss on the text is that of the exact solution."""
    W, X = random(*shape), rows(shape[1], count=count, dead=dead)
    moments = measured(X)
    S = least_damped_cholesky(moments.second, name=WHERE)
    assert difference(S @ S.T, moments.second) < 1e-10 * float(moments.second.diagonal().max())
    for rank in ranks(shape):
        exact = lord(W, None, moments, rank, name=WHERE, centred=False)
        found = svd_llm(W, moments.second, rank, name=WHERE)
        assert loss(found, X, W, None) == pytest.approx(loss(exact, X, W, None), rel=1e-6, abs=1e-8)


def test_inputs_that_are_all_zero_are_named():
    message = f"The inputs of {WHERE} are all zero. Calibrate on other text."
    with pytest.raises(NumericalError, match=f"^{re.escape(message)}$"):
        svd_llm(random(5, 9), torch.zeros(9, 9).double(), 2, name=WHERE)


# ---- LoRD ----


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
        found = lord(W, b, measured(X), rank, name=WHERE)
        product, bias = lord_of_rows(X, W, b, rank)
        assert is_of_rank(found, rank, shape)
        assert found.bias is not None
        assert difference(found.product, product) < 1e-9
        assert difference(found.bias, bias) < 1e-9
        assert difference(found.B.T @ found.B, torch.eye(rank).double()) < 1e-12


@pytest.mark.parametrize(("count", "dead"), [(ROWS, (1, 4)), (4, ())], ids=["dead inputs", "fewer tokens than inputs"])
@EVERY_SHAPE
def test_lord_where_inputs_are_no_basis(shape, count, dead):
    """Up to what the outputs have of directions it is the formula; from there on nothing of them is lost."""
    W, b = random(*shape), random(shape[0], seed=3)
    X = rows(shape[1], count=count, dead=dead)
    directions = int(torch.linalg.matrix_rank(covariance(outputs(X, W, b))))
    assert directions < min(shape) or shape == WIDE
    for rank in ranks(shape):
        found = lord(W, b, measured(X), rank, name=WHERE)
        assert is_of_rank(found, rank, shape)
        assert difference(found.B.T @ found.B, torch.eye(rank).double()) < 1e-12
        if rank <= directions:
            assert difference(found.product, lord_of_rows(X, W, b, rank)[0]) < 1e-9
        if rank >= directions:
            assert loss(found, X, W, b) < 1e-18


@EVERY_SHAPE
@pytest.mark.parametrize("centred", [True, False], ids=["centred", "uncentred"])
def test_full_rank_is_the_linear_itself(centred, shape):
    W, b, X = random(*shape), random(shape[0], seed=3), rows(shape[1])
    G = covariance(random(40, shape[0], seed=4))
    for metric in (None, gradient_metric(G, 0.9, name=WHERE), gradient_metric(G.diagonal(), 0.9, name=WHERE)):
        found = weighted(W, b, measured(X), min(shape), metric, name=WHERE, centred=centred)
        assert found.bias is not None
        assert difference(found.product, W) < 1e-10
        assert difference(found.bias, b) < 1e-10
    for full in (
        svd(W, min(shape)),
        asvd(W, measured(X).mean_abs, min(shape)),
        svd_llm(W, measured(X).second, min(shape), name=WHERE),
    ):
        assert difference(full.product, W) < 1e-10


@EVERY_SHAPE
def test_the_bias_keeps_the_outputs_mean(shape):
    W, b, X = random(*shape), random(shape[0], seed=3), rows(shape[1])
    metric = gradient_metric(covariance(random(40, shape[0], seed=4)), 0.9, name=WHERE)
    for factors in (lord(W, b, measured(X), 2, name=WHERE), weighted(W, b, measured(X), 2, metric, name=WHERE)):
        assert difference(given(factors, X).mean(0), outputs(X, W, b).mean(0)) < 1e-12


@EVERY_SHAPE
def test_scales_of_inputs_and_outputs_change_nothing(shape):
    W, b, X = random(*shape), random(shape[0], seed=3), rows(shape[1])
    metric = gradient_metric(covariance(random(40, shape[0], seed=4)), 0.9, name=WHERE)
    for of, by in itertools.product((1e-6, 1.0, 1e6), (1e-6, 1e6)):
        scaled = measured(of * X)
        for one in (None, metric):
            expected = weighted(W, b, measured(X), 2, one, name=WHERE)
            found = weighted(by * W, of * by * b, scaled, 2, one, name=WHERE)
            assert expected.bias is not None
            assert found.bias is not None
            assert difference(found.product / by, expected.product) < 1e-9
            assert difference(found.bias / of / by, expected.bias) < 1e-9
        expected = svd_llm(W, measured(X).second, 2, name=WHERE)
        assert difference(svd_llm(by * W, scaled.second, 2, name=WHERE).product / by, expected.product) < 1e-9
        expected = asvd(W, measured(X).mean_abs, 2)
        assert difference(asvd(by * W, scaled.mean_abs, 2).product / by, expected.product) < 1e-9


# ---- an error's weight ----


def blended(G: Tensor, weight: float) -> Tensor:
    return (1 - weight) * torch.eye(len(G)).double() + weight * G / (G.trace() / len(G))


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.999])
def test_the_metric_is_the_blend_of_identity_and_gradient(weight):
    G = covariance(random(3, 6, seed=4))  # fewer tokens than outputs
    full, diagonal = gradient_metric(G, weight, name=WHERE), gradient_metric(G.diagonal(), weight, name=WHERE)
    assert full is not None
    assert diagonal is not None
    assert difference(full.L @ full.L.T, blended(G, weight)) < 1e-12
    assert torch.equal(full.L, full.L.tril())
    assert diagonal.L.shape == (6,)
    assert difference(torch.diag(diagonal.L**2), blended(torch.diag(G.diagonal()), weight)) < 1e-12
    alike = gradient_metric(torch.diag(G.diagonal()), weight, name=WHERE)
    assert alike is not None
    assert difference(torch.diag(diagonal.L), alike.L) < 1e-12


@pytest.mark.parametrize("form", ["full", "diagonal"])
def test_a_metric_goes_there_and_back(form):
    G, W = covariance(random(40, 6, seed=4)), random(6, 4)
    metric = gradient_metric(G if form == "full" else G.diagonal(), 0.9, name=WHERE)
    assert metric is not None
    L = metric.L if form == "full" else torch.diag(metric.L)
    assert difference(metric.apply(W), L.T @ W) < 1e-12
    assert difference(metric.take_back(W), torch.linalg.inv(L.T) @ W) < 1e-12


def test_there_is_no_metric_where_nothing_is_felt():
    G = covariance(random(40, 6, seed=4))
    for gradient in (G, G.diagonal()):
        assert gradient_metric(gradient, 0.0, name=WHERE) is None
        assert gradient_metric(torch.zeros_like(gradient), 0.9, name=WHERE) is None


def test_the_gradients_scale_and_dtype_do_not_matter():
    G, W, X = covariance(random(40, 5, seed=4)), random(*WIDE), rows(9)
    expected = weighted(W, None, measured(X), 2, gradient_metric(G, 0.9, name=WHERE), name=WHERE)
    for scale in (1e-12, 1e12):
        metric = gradient_metric(scale * G, 0.9, name=WHERE)
        assert difference(weighted(W, None, measured(X), 2, metric, name=WHERE).product, expected.product) < 1e-9
    rounded, metric = gradient_metric(G.float().double(), 0.9, name=WHERE), gradient_metric(G.float(), 0.9, name=WHERE)
    assert rounded is not None
    assert metric is not None
    assert torch.equal(metric.L, rounded.L)


@EVERY_SHAPE
def test_a_gradient_alike_everywhere_is_lord(shape):
    W, b, X = random(*shape), random(shape[0], seed=3), rows(shape[1])
    for gradient in (3 * torch.eye(shape[0]).double(), 3 * torch.ones(shape[0]).double()):
        metric = gradient_metric(gradient, 0.7, name=WHERE)
        found, expected = weighted(W, b, measured(X), 2, metric, name=WHERE), lord(W, b, measured(X), 2, name=WHERE)
        assert difference(found.product, expected.product) < 1e-10


METRICS = ["none", "full", "diagonal"]


def metric_of(kind: str, m: int) -> tuple[Metric | None, Tensor]:
    """And its L in full."""
    if kind == "none":
        return None, torch.eye(m).double()
    mix = random(m, m, seed=5) @ torch.diag(torch.logspace(0, -1, m).double())
    G = covariance(random(40, m, seed=4) @ mix)
    metric = gradient_metric(G if kind == "full" else G.diagonal(), 0.95, name=WHERE)
    assert metric is not None
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


def best_outer(A: Tensor, X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    """B and the bias by least squares for given A; the least in every metric, for each output is fitted alone."""
    inputs = torch.cat([X @ A.T, torch.ones(len(X), 1).double()], dim=1)
    solution = torch.linalg.lstsq(inputs, Y, driver="gelsd").solution
    return solution[:-1].T, solution[-1]


@pytest.mark.parametrize("kind", METRICS)
@EVERY_SHAPE
def test_no_other_factors_lose_less(shape, kind):
    """Neither random ones, each with its best B and bias, nor their neighbours on the way down the slope."""
    W, b, X = random(*shape), random(shape[0], seed=3), rows(shape[1])
    metric, L = metric_of(kind, shape[0])
    Y, rank = outputs(X, W, b), 2
    found = weighted(W, b, measured(X), rank, metric, name=WHERE)
    least = loss(found, X, W, b, L)
    for seed in range(12):
        A = random(rank, shape[1], seed=seed)
        if seed % 2:
            A = found.A + 0.05 * A
        B, bias = best_outer(A, X, Y)
        assert loss(Factors(B, A, bias), X, W, b, L) > least
    parts = [part.clone().requires_grad_() for part in (found.B, found.A, found.bias) if part is not None]
    error = (Y - (X @ parts[1].T @ parts[0].T + parts[2])) @ L
    slopes = torch.autograd.grad(error.square().sum() / len(X), parts)
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-10 * float(Y.square().mean())
    for seed in range(12):
        for size in (1e-4, 1e-2, 1.0):
            B, A, bias = (part.detach() + size * random(*part.shape, seed=seed + 7) for part in parts)
            assert loss(Factors(B, A, bias), X, W, b, L) > least


def test_the_metric_decides_what_is_kept():
    """Of two outputs of one size the one that the loss feels."""
    W, X = torch.eye(2).double(), random(ROWS, 2)
    X = X / covariance(X).diagonal().sqrt()
    for felt in (0, 1):
        gradient = torch.zeros(2).double()
        gradient[felt] = 1
        found = weighted(W, None, measured(X), 1, gradient_metric(gradient, 0.99, name=WHERE), name=WHERE)
        error = (outputs(X, W, None) - given(found, X)).square().mean(0)
        assert error[felt] < 0.1 * error[1 - felt]


# ---- energies ----


@pytest.mark.parametrize("centred", [True, False], ids=["centred", "uncentred"])
@EVERY_SHAPE
def test_energies_are_the_outputs_eigenvalues(shape, centred):
    W, b, X = random(*shape), random(shape[0], seed=3), rows(shape[1])
    Y = outputs(X, W, b if centred else None)
    C = covariance(Y) if centred else sum(torch.outer(y, y) for y in Y) / len(Y)
    found = output_energies(W, measured(X).spread(centred=centred))
    expected = torch.linalg.eigvalsh(C).flip(0)
    assert found.shape == (min(shape),)
    assert difference(found, expected[: min(shape)]) < 1e-10
    assert expected[min(shape) :].abs().sum() < 1e-10


@pytest.mark.parametrize("centred", [True, False], ids=["centred", "uncentred"])
@EVERY_SHAPE
def test_what_lord_loses_is_the_energies_tail(shape, centred):
    W, X = random(*shape), rows(shape[1])
    moments = measured(X)
    energies = output_energies(W, moments.spread(centred=centred))
    for rank in ranks(shape):
        found = lord(W, None, moments, rank, name=WHERE, centred=centred)
        assert loss(found, X, W, None) == pytest.approx(float(energies[rank:].sum()), rel=1e-9, abs=1e-18)


@pytest.mark.parametrize("kind", METRICS)
def test_energies_in_a_metric_are_what_is_lost_in_it(kind):
    W, X = random(*WIDE), rows(9)
    metric, L = metric_of(kind, 5)
    energies = output_energies(W if metric is None else metric.apply(W), measured(X).spread(centred=True))
    for rank in ranks(WIDE):
        found = weighted(W, None, measured(X), rank, metric, name=WHERE)
        assert loss(found, X, W, None, L) == pytest.approx(float(energies[rank:].sum()), rel=1e-9, abs=1e-18)


def test_energies_are_never_negative():
    X = rows(9, count=3)
    for shape in SHAPES.values():
        energies = output_energies(random(*shape), measured(X[:, : shape[1]]).spread(centred=True))
        assert (energies >= 0).all()
        assert all(a >= b for a, b in itertools.pairwise(energies.tolist()))


@EVERY_SHAPE
def test_directions_are_orthonormal_and_diagonalise_the_outputs(shape):
    W, X = random(*shape), rows(shape[1])
    U = output_directions(W, measured(X).spread(centred=True), name=WHERE)
    C = U.T @ covariance(X @ W.T) @ U
    assert U.shape == (shape[0], min(shape))
    assert difference(U.T @ U, torch.eye(min(shape)).double()) < 1e-12
    assert difference(C, torch.diag(C.diagonal())) < 1e-10
    assert all(a >= b for a, b in itertools.pairwise(C.diagonal().tolist()))


def test_orthonormal_columns_keep_their_directions():
    Q = torch.linalg.qr(random(7, 4)).Q
    lengths = torch.tensor([3.0, 1e-3, 2.0, 0.5]).double()
    assert difference(orthonormal(Q * lengths), Q) < 1e-12
    lengths[2:] = 0
    found = orthonormal(Q * lengths)
    assert difference(found[:, :2], Q[:, :2]) < 1e-12
    assert difference(found.T @ found, torch.eye(4).double()) < 1e-12


# ---- moments ----


def test_moments_through_a_matrix_are_those_of_its_outputs():
    X, A = rows(9), random(4, 9, seed=5)
    found, expected = measured(X).through(A), measured(X @ A.T)
    assert difference(found.second, expected.second) < 1e-10
    assert difference(found.mean, expected.mean) < 1e-12


def test_shifted_moments_are_those_of_shifted_inputs():
    X, b = rows(9), random(9, seed=5)
    found, expected = measured(X).shifted(b), measured(X + b)
    assert difference(found.second, expected.second) < 1e-10
    assert difference(found.mean, expected.mean) < 1e-12


def test_a_normal_distribution_tells_the_mean_size():
    X = random(100_000, 3, seed=5) * torch.tensor([1.0, 5.0, 0.1])
    second = X.T @ X / len(X)
    found = normal_moments(second, X.mean(0))
    assert torch.equal(found.second, second)
    assert torch.equal(found.mean, X.mean(0))
    # The mean of |x| over that many has a standard error of 0.2%.
    assert (found.mean_abs / X.abs().mean(0) - 1).abs().max() < 0.01
    for a, square in zip(found.mean_abs, second.diagonal(), strict=True):
        assert float(a) == pytest.approx((2 / torch.pi * float(square)) ** 0.5, rel=1e-12)


def test_spreads_are_the_covariance_and_the_second_moment():
    X = rows(9)
    moments = measured(X)
    assert difference(moments.spread(centred=True).C, covariance(X)) < 1e-10
    assert torch.equal(moments.spread(centred=False).C, moments.second)
    for centred in (True, False):
        spread = moments.spread(centred=centred)
        assert difference(spread.root @ spread.root.T, spread.C) < 1e-10
        # What all linears of these inputs need is computed once.
        assert moments.spread(centred=centred) is spread
        assert spread.root is spread.root


def test_a_root_exists_where_rounding_made_the_spread_indefinite():
    X = rows(9, count=3)
    C = covariance(X)
    root = Spread(C).root
    assert difference(root @ root.T, C) < 1e-10


# ---- by rows ----


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


@pytest.mark.parametrize("method", ["lord", "svd", "asvd", "svd_llm"])
def test_every_methods_factors_can_be_pivoted(method):
    W, moments = random(14, 10) @ torch.diag(torch.logspace(0, -4, 10).double()), measured(rows(10))
    for rank in (1, 3, 7, 10):
        factors = {
            "lord": lambda r: lord(W, None, moments, r, name=WHERE),
            "svd": lambda r: svd(W, r),
            "asvd": lambda r: asvd(W, moments.mean_abs, r),
            "svd_llm": lambda r: svd_llm(W, moments.second, r, name=WHERE),
        }[method](rank)
        assert difference(restored(factors), factors.product) < 1e-10
        split = pivoted(factors)
        assert split.C.abs().max() <= LARGEST_ENTRY


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e12])
def test_pivots_do_not_depend_on_scales(scale):
    B, A = random(12, 4), random(4, 7, seed=1)
    sizes = torch.tensor([1.0, scale, 1.0, scale]).double()
    expected, found = pivoted(Factors(B, A, None)), pivoted(Factors(B * sizes, A / sizes[:, None], None))
    assert difference(found.A, (B @ A)[found.rows]) < 1e-10
    assert difference(restored(Factors(B * sizes, A / sizes[:, None], None)), B @ A) < 1e-10
    everywhere = pivoted(Factors(scale * B, A, None))
    assert torch.equal(everywhere.rows, expected.rows)
    assert difference(everywhere.C, expected.C) < 1e-10


def test_what_is_pivoted_stays_as_it_was():
    B, A = random(12, 4), random(4, 7)
    before = B.clone(), A.clone()
    pivoted(Factors(B, A, None))
    assert torch.equal(B, before[0])
    assert torch.equal(A, before[1])


def dependent(kind: str) -> Tensor:
    B = random(8, 3)
    if kind == "a zero column":
        B[:, 1] = 0
    elif kind == "a column twice":
        B[:, 1] = B[:, 0]
    elif kind == "a sum of columns":
        B[:, 2] = B[:, 0] + B[:, 1]
    elif kind == "two rows":
        B[2:] = 0
    elif kind == "all zero":
        B = torch.zeros_like(B)
    elif kind == "square":
        B = torch.ones(4, 4).double()
    elif kind == "one column":
        B = torch.zeros(6, 1).double()
    elif kind == "below the least normal number":
        B[:, 2] *= 1e-320
    else:
        B[2, 1] = float(kind)
    return B


DEPENDENT = ["a zero column", "a column twice", "a sum of columns", "two rows", "all zero", "square", "one column"]
STUCK = ["below the least normal number", "nan", "inf"]


@pytest.mark.timeout(1)
@pytest.mark.parametrize("kind", [*DEPENDENT, *STUCK])
def test_without_independent_rows_there_are_no_pivots(kind):
    B = dependent(kind)
    with pytest.raises(NumericalError, match="fewer independent rows"):
        pivoted(Factors(B, random(B.shape[1], 5), None))


@pytest.mark.parametrize("condition", [1e8, 1e15, 1e20, 1e40])
def test_rows_that_are_hardly_independent_give_small_entries_or_an_error(condition):
    """The error only where rounding leaves no independent rows."""
    sizes = torch.logspace(0, -math.log10(condition), 8).double()
    for seed in range(40):
        B = random(30, 8, seed=seed) @ torch.diag(sizes) @ random(8, 8, seed=seed + 1)
        factors = Factors(B, random(8, 9, seed=seed + 2), None)
        try:
            split = pivoted(factors)
        except NumericalError:
            assert condition > 1e15
            continue
        assert split.C.abs().max() <= LARGEST_ENTRY * (1 + 1e-9)
        assert difference(restored(factors), factors.product) < 1e-10


# ---- what is no number ----


@pytest.mark.parametrize("fault", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("place", ["weight", "a moment", "moments of an input"])
@pytest.mark.parametrize("method", ["lord", "uncentred lord", "weighted", "svd_llm"])
@EVERY_SHAPE
def test_no_number_is_an_error_that_names_the_place(shape, method, place, fault):
    W, X = random(*shape), rows(shape[1])
    moments = measured(X)
    if place == "weight":
        W[2, 3] = fault
    elif place == "a moment":
        moments.second[2, 3] = moments.second[3, 2] = fault
    else:
        moments.second[2] = moments.second[:, 2] = fault
        moments.mean[2] = fault
    metric = gradient_metric(covariance(random(40, shape[0])), 0.9, name=WHERE)
    methods = {
        "lord": lambda: lord(W, None, moments, 2, name=WHERE),
        "uncentred lord": lambda: lord(W, None, moments, 2, name=WHERE, centred=False),
        "weighted": lambda: weighted(W, None, moments, 2, metric, name=WHERE),
        "svd_llm": lambda: svd_llm(W, moments.second, 2, name=WHERE),
    }
    with pytest.raises(NumericalError, match=WHERE) as error:
        methods[method]()
    assert "all zero. Calibrate" not in str(error.value)


@pytest.mark.parametrize("fault", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("place", [(2, 2), (2, 3)], ids=["on the diagonal", "beside it"])
def test_a_gradient_that_is_no_number_is_not_passed_over(place, fault):
    G = covariance(random(40, 6))
    G[place] = G[place[::-1]] = fault
    with pytest.raises(NumericalError, match=WHERE):
        gradient_metric(G, 0.9, name=WHERE)
    if place == (2, 2):
        with pytest.raises(NumericalError, match=WHERE):
            gradient_metric(G.diagonal(), 0.9, name=WHERE)
