"""Principal components and norm conversion, against their definitions."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from compress.errors import NumericalError
from compress.numerics.linalg import kept_energy, pca, random_orthogonal, width_for_energy
from compress.numerics.norms import center_rows, fold_gain, fold_offset
from compress.numerics.precision import full_precision
from compress.streaming.statistics import RelativeError, SecondMoment

D = 12
CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def identity(width: int) -> Tensor:
    return torch.eye(width, dtype=torch.float64)


def reflection(axis: Tensor) -> Tensor:
    """I - 2 v v^T: orthogonal, and its columns are known without any solver."""
    v = axis / axis.norm()
    return identity(len(axis)) - 2 * torch.outer(v, v)


@pytest.mark.parametrize("seed", range(3))
def test_pca_finds_the_components_it_was_made_of(seed):
    vectors = reflection(random(D, seed=seed)) @ reflection(random(D, seed=seed + 10))
    eigenvalues = torch.linspace(5.0, 0.5, D, dtype=torch.float64)
    order = torch.randperm(D, generator=torch.Generator().manual_seed(seed))
    C = vectors[:, order] @ torch.diag(eigenvalues[order]) @ vectors[:, order].T
    Q, found = pca(C, name="a test")
    assert (found - eigenvalues).abs().max() < 1e-12
    for column, vector in zip(Q.T, vectors.T, strict=True):
        sign = 1 if vector[vector.abs().argmax()] > 0 else -1
        assert (column - sign * vector).abs().max() < 1e-10


def test_pca_is_an_orthogonal_diagonalisation_in_decreasing_order():
    X = random(50, D)
    C = X.T @ X / 50
    Q, eigenvalues = pca(C, name="a test")
    assert (Q.T @ Q - identity(D)).abs().max() < 1e-12
    assert (Q @ torch.diag(eigenvalues) @ Q.T - C).abs().max() < 1e-12
    assert all(a >= b for a, b in itertools.pairwise(eigenvalues.tolist()))


def test_each_components_largest_entry_is_positive():
    X = random(50, D)
    Q, _ = pca(X.T @ X, name="a test")
    for column in Q.T.tolist():
        assert max(column, key=abs) > 0


def test_a_rank_deficient_moment_has_no_negative_eigenvalue():
    X = random(4, D)
    Q, eigenvalues = pca(X.T @ X, name="a test")
    assert (eigenvalues >= 0).all()
    assert (eigenvalues[4:] < 1e-12).all()
    assert (Q.T @ Q - identity(D)).abs().max() < 1e-12


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_pca_refuses_what_is_no_number(value):
    C = identity(D)
    C[3, 4] = C[4, 3] = value
    with pytest.raises(NumericalError) as error:
        pca(C, name="the stream after block 3 mlp")
    assert str(error.value) == (
        "The second moment of the stream after block 3 mlp has a NaN or Inf. Check the weights before it and the text."
    )


def test_random_orthogonal_is_orthogonal_and_seeded():
    draws = [random_orthogonal(D, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    for Q in draws:
        assert Q.dtype == torch.float64
        assert (Q.T @ Q - identity(D)).abs().max() < 1e-12
    assert torch.equal(draws[0], draws[1])
    assert (draws[0] - draws[2]).abs().max() > 0.1


def test_random_orthogonal_favours_no_direction():
    """Of the Haar measure: entries have mean 0 and variance 1/D, the diagonal too, where unfixed signs would show."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([random_orthogonal(4, generator) for _ in range(4000)])
    assert draws.mean(0).abs().max() < 0.05
    assert (draws.square().mean(0) - 1 / 4).abs().max() < 0.02


def slow_width(eigenvalues: list[float], share: float) -> int:
    return min(
        width for width in range(1, len(eigenvalues) + 1) if sum(eigenvalues[:width]) >= share * sum(eigenvalues)
    )


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.75, 0.9, 0.99, 1.0])
def test_width_for_energy_is_the_least_that_holds_the_share(share):
    # Halves, quarters, integers: sums are exact in floating point, so ties are ties.
    spectra = [[8.0, 4.0, 2.0, 1.0, 0.5, 0.5], [1.0] * 8, [5.0, 0.0, 0.0], [3.0], [4.0, 4.0, 0.0]]
    for spectrum in spectra:
        width = width_for_energy(torch.tensor(spectrum, dtype=torch.float64), share)
        assert width == slow_width(spectrum, share)


def test_kept_energy_is_a_share_of_the_sum():
    eigenvalues = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    assert [kept_energy(eigenvalues, width) for width in range(1, 5)] == pytest.approx([0.4, 0.7, 0.9, 1.0])
    assert kept_energy(torch.zeros(4, dtype=torch.float64), 2) == 1.0


def rms_norm(x: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_is_an_rms_norm_between_folded_linears(bias):
    """Equation 4 of the paper: linear(LayerNorm(writer(h))) with everything of the norm inside the two linears."""
    eps = 1e-2
    writer, reader = (nn.Linear(D, D, bias=bias, dtype=torch.float64) for _ in range(2))
    norm = nn.LayerNorm(D, eps=eps, dtype=torch.float64)
    for number, parameter in enumerate(norm.parameters()):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    h = random(20, D)
    with torch.no_grad():
        expected = reader(norm(writer(h)))
        W = center_rows(writer.weight)
        b = writer.bias - writer.bias.mean() if bias else 0
        stream = h @ W.T + b
        assert stream.mean(-1).abs().max() < 1e-12
        folded = fold_offset(reader.weight, reader.bias if bias else None, norm.bias)
        found = rms_norm(stream, eps) @ fold_gain(reader.weight, norm.weight).T + folded
    assert (found - expected).abs().max() < 1e-10


def test_center_rows_is_the_projection_written_out():
    W = random(D, 5)
    M = identity(D) - torch.full((D, D), 1 / D, dtype=torch.float64)
    assert (center_rows(W) - M @ W).abs().max() < 1e-12


@pytest.mark.parametrize("signal", ["stream", "normed"])
def test_second_moment_is_a_mean_of_outer_products(signal):
    batches = [random(2, 5, D, seed=1), random(1, 3, D, seed=2)]
    accumulator = SecondMoment(signal).accumulator(D, 0.1, CPU)
    for batch in batches:
        accumulator.add(batch, None)
    expected, tokens = torch.zeros(D, D, dtype=torch.float64), 0
    for x in torch.cat([batch.reshape(-1, D) for batch in batches]):
        row = x / torch.sqrt((x * x).sum() / D + 0.1) if signal == "normed" else x
        expected += torch.outer(row, row)
        tokens += 1
    assert (accumulator.value() - expected / tokens).abs().max() < 1e-12


def test_second_moment_of_float32_is_summed_in_float64():
    """1 and then 1e-10, a thousand times: float32 would lose every one of them."""
    accumulator = SecondMoment("stream").accumulator(1, 0.0, CPU)
    accumulator.add(torch.tensor([[[1.0]]]), None)
    for _ in range(1000):
        accumulator.add(torch.full((1, 1, 1), 1e-5), None)
    small = float(torch.tensor(1e-5).double() ** 2)
    assert float(accumulator.value()) == pytest.approx((1 + 1000 * small) / 1001, rel=1e-14)


def test_relative_error_is_the_share_of_energy_that_differs():
    accumulator = RelativeError().accumulator(D, 0.0, CPU)
    dense = [random(2, 3, D, seed=1), random(1, 3, D, seed=2)]
    stream = [x + 0.1 * random(*x.shape, seed=3) for x in dense]
    for a, b in zip(stream, dense, strict=True):
        accumulator.add(a, b)
    difference = sum(float(((a - b) ** 2).sum()) for a, b in zip(stream, dense, strict=True))
    assert float(accumulator.value()) == pytest.approx(difference / sum(float((x**2).sum()) for x in dense), rel=1e-12)


def test_full_precision_puts_the_settings_back():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = (matmul.allow_tf32, cudnn.allow_tf32)
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = True
        with full_precision():
            assert not matmul.allow_tf32
            assert not cudnn.allow_tf32
        assert matmul.allow_tf32
        assert cudnn.allow_tf32
        with pytest.raises(KeyError), full_precision():
            raise KeyError
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
