"""Principal components and norm conversion, against their definitions."""

import pytest
import torch
from torch import Tensor, nn

from compress.errors import NumericalError
from compress.numerics.frames import pca, random_orthogonal
from compress.numerics.functional import center_rows, fold_gain, fold_offset
from compress.numerics.moments import SOLVED, triangular_inverse
from matrices import identity, random

D = 12


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


@pytest.mark.parametrize("size", [1, SOLVED, 2 * SOLVED + 77])
def test_a_triangle_is_inverted_by_halves(size):
    R = torch.linalg.qr(random(2 * size, size, seed=1))[1]
    found = triangular_inverse(R)
    assert torch.equal(found, found.triu())
    assert (found @ R - identity(size)).abs().max() < 1e-12


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
