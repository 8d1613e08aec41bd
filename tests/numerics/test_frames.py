"""Frames of the stream against what they are to be: projections, nested, and the best ones of their rank."""

import pytest
import torch
from torch import Tensor

from compress.errors import NumericalError
from compress.numerics.frames import (
    FLOOR,
    Frame,
    balanced_frame,
    beside_the_mean,
    zero_mean_basis,
)
from matrices import identity, random

D, ROWS = 12, 400
WHERE = "the stream of a test"
WEIGHTS = [0.1, 0.5, 0.9, 0.999]


def signal(seed: int, width: int = D) -> Tensor:
    """Rows that move far in some directions and hardly in others."""
    mix = random(width, width, seed=seed + 1) @ torch.diag(torch.logspace(0, -2, width).double())
    return random(ROWS, width, seed=seed) @ mix @ torch.linalg.qr(random(width, width, seed=seed + 2)).Q


def moments(seed: int = 0, width: int = D) -> tuple[Tensor, Tensor]:
    X, gradients = signal(10 * seed, width), signal(10 * seed + 5, width)
    return X.T @ X / ROWS, 1e-4 * gradients.T @ gradients / ROWS


def frames(kind: str, seed: int = 0) -> Frame:
    C, G = moments(seed)
    if kind == "orthogonal":
        return balanced_frame(C, None, 0.0, name=WHERE)
    if kind == "oblique":
        return balanced_frame(C, G, 0.9, name=WHERE)
    H = zero_mean_basis(D)
    within = balanced_frame(H.T @ C @ H, H.T @ G @ H, 0.0 if "orthogonal" in kind else 0.9, name=WHERE)
    return beside_the_mean(within, H)


KINDS = ["orthogonal", "oblique", "orthogonal beside the mean", "oblique beside the mean"]


def projection(frame: Frame, width: int) -> Tensor:
    return frame.encode(width) @ frame.decode(width)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_comes_back_whole(kind):
    for seed in range(3):
        frame = frames(kind, seed)
        for width in range(1, D + 1):
            encode, decode = frame.encode(width), frame.decode(width)
            assert encode.shape == decode.T.shape == (D, width)
            assert (decode @ encode - identity(width)).abs().max() < 1e-9
            assert (encode.T @ decode.T - identity(width)).abs().max() < 1e-9
            assert (decode @ decode.T - identity(width)).abs().max() < 1e-12


def objective(C: Tensor, G: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """C and M = (1 - w) I + w G as the docstring has them, both scaled to trace D."""
    scaled = C / C.diagonal().mean() + FLOOR * identity(len(C))
    return scaled, (1 - weight) * identity(len(C)) + weight * G / G.diagonal().mean()


def error(P: Tensor, C: Tensor, M: Tensor) -> float:
    """E (x - x P) M (x - x P)^T over rows x with second moment C."""
    lost = identity(len(C)) - P
    return float((lost.T @ C @ lost @ M).trace())


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T


def random_projection(width: int, seed: int) -> Tensor:
    """Onto a random subspace along another random one."""
    A, B = random(D, width, seed=seed), random(D, width, seed=seed + 1000)
    return A @ torch.linalg.solve(B.T @ A, B.T)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_no_projection_loses_less_of_what_counts(weight):
    """What x -> x P loses in the metric M is least of all maps of its rank: X P M^1/2 is the truncated SVD of
    X M^1/2 (Eckart and Young), and what is lost is the rest of the singular values squared, the frame's own importance.
    """
    C, G = moments()
    exact, M = objective(C, G, weight)
    frame = balanced_frame(C, G, weight, name=WHERE)
    principal = balanced_frame(C, None, 0.0, name=WHERE)
    X = root(exact)  # D rows whose sum of x x^T is C
    U, S, V = torch.linalg.svd(X @ root(M))
    for width in range(1, D):
        P = projection(frame, width)
        lost = error(P, exact, M)
        truncated = U[:, :width] @ torch.diag(S[:width]) @ V[:width]
        assert (X @ P @ root(M) - truncated).abs().max() < 1e-7
        assert lost == pytest.approx(float(S[width:].square().sum()), rel=1e-7)
        assert frame.importance is not None
        assert lost == pytest.approx(float(frame.importance[width:].sum()), rel=1e-7)
        assert lost <= error(projection(principal, width), exact, M) * (1 + 1e-9)
    for width in (2, D // 2, D - 2):
        lost = error(projection(frame, width), exact, M)
        assert all(lost <= error(random_projection(width, trial), exact, M) for trial in range(200))
    width = D // 2
    assert error(projection(frame, width), exact, M) < 0.99 * error(projection(principal, width), exact, M)


@pytest.mark.parametrize("kind", KINDS[2:])
def test_beside_the_mean_the_mean_is_last(kind):
    """Every smaller width lives in the space without a mean and does not see it; within, it is the frame it was."""
    C, G = moments()
    H = zero_mean_basis(D)
    within = balanced_frame(H.T @ C @ H, H.T @ G @ H, 0.0 if "orthogonal" in kind else 0.9, name=WHERE)
    frame = beside_the_mean(within, H)
    assert type(frame) is type(within)
    ones = torch.ones(D).double() / D**0.5
    assert (frame.decode(D)[-1] - ones).abs().max() < 1e-12
    assert frame.energy[-1] == 0
    assert torch.equal(frame.energy[:-1], within.energy)
    for width in range(1, D):
        assert (ones @ frame.encode(width)).abs().max() < 1e-9
        assert (frame.decode(width) @ ones).abs().max() < 1e-12
        assert (projection(frame, width) - H @ projection(within, width) @ H.T).abs().max() < 1e-9
    assert (projection(frame, D - 1) - (identity(D) - torch.outer(ones, ones))).abs().max() < 1e-9


def test_an_error_names_the_place():
    C, G = moments()
    broken_moment, broken_gradient = C.clone(), G.clone()
    broken_moment[3, 3] = broken_gradient[3, 3] = float("nan")
    with pytest.raises(NumericalError, match=WHERE):
        balanced_frame(broken_moment, G, 0.9, name=WHERE)
    with pytest.raises(NumericalError, match=WHERE):
        balanced_frame(broken_moment, None, 0.0, name=WHERE)
    with pytest.raises(NumericalError) as raised:
        balanced_frame(C, broken_gradient, 0.9, name=WHERE)
    assert str(raised.value).startswith(f"The second moment of the loss's gradient at {WHERE} has a NaN or Inf.")
