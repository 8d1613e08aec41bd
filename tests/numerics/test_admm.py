"""Sparse plus low rank against the same alternation written out with dense solves and exact decompositions."""

import itertools

import pytest
import torch
from torch import Tensor

from compress.numerics.admm import Split
from compress.numerics.admm import sparse_plus_lowrank as split_together
from compress.numerics.moments import Hessian
from compress.numerics.sparsity import Pattern, keep_mask, wanda
from compress.numerics.sweep import sweep
from matrices import difference, random, rows

M, N, TOKENS = 12, 32, 200
WHERE = "block 3 mlp.down_proj"
DAMPING = 0.003
ITERATIONS = 120
PATTERNS = ("2:4", "50%")
EVERY_PATTERN = pytest.mark.parametrize("text", PATTERNS)


def hessian(X: Tensor) -> Hessian:
    return Hessian(X.T @ X / len(X), DAMPING, WHERE)


def error(W: Tensor, other: Tensor, H: Tensor) -> float:
    """Row by row, as a share of W's own."""
    return sum(float(d @ H @ d) for d in W - other) / sum(float(w @ H @ w) for w in W)


def least_squares(W: Tensor, mask: Tensor, H: Tensor) -> Tensor:
    """The best weights within the mask, row by row."""
    best = torch.zeros_like(W)
    for i in range(len(W)):
        kept = mask[i].nonzero()[:, 0]
        best[i, kept] = torch.linalg.solve(H[kept][:, kept], H[kept] @ W[i])
    return best


def nearest_of_rank(E: Tensor, H: Tensor, rank: int) -> Tensor:
    """By the SVD of E H^(1/2), the symmetric root."""
    values, Q = torch.linalg.eigh(H)
    root = Q @ torch.diag(values.sqrt()) @ Q.T
    U, S, Vh = torch.linalg.svd(E @ root, full_matrices=False)
    return U[:, :rank] @ torch.diag(S[:rank]) @ Vh[:rank] @ torch.linalg.inv(root)


def sparse_plus_lowrank(W: Tensor, H: Hessian, pattern: Pattern, rank: int, *, iterations: int) -> Split:
    (split,) = split_together([W], H, pattern, [rank], iterations=iterations)
    return split


def slowly(W: Tensor, H: Tensor, pattern: Pattern, rank: int, iterations: int) -> Split:
    """The formulas of the paper, line by line, with the schedule of rho: V = rho U is the dual."""
    scale = H.diagonal().sqrt()
    G, T, eye = H / torch.outer(scale, scale), W * scale, torch.eye(len(H)).double()
    mask = keep_mask(T.abs(), pattern)
    D, V, L = T * mask, torch.zeros_like(T), torch.zeros_like(T)
    for iteration in range(1, iterations + 1):
        rho = 0.1 * (6 if rank else 10) ** ((iteration - 1) // 8 * 8 / iterations)
        S = torch.linalg.solve(G + rho * eye, ((T - L) @ G + rho * D - V).T).T
        mask = keep_mask((S + V / rho).abs(), pattern)
        D = torch.where(mask, S + V / rho, 0.0)
        V = V + rho * (S - D)
        if rank:
            L = nearest_of_rank(T - S, G, rank)
    return Split(D / scale, L / scale, mask)


def counted(mask: Tensor, text: str) -> None:
    if text == "50%":
        assert (mask.sum(1) == mask.shape[1] // 2).all()
    else:
        keep, group = int(text[0]), int(text[-1])
        assert (mask.unflatten(1, (-1, group)).sum(-1) == keep).all()


@EVERY_PATTERN
def test_without_a_low_rank_it_is_the_formulas(text):
    W, H = random(M, N, seed=9), hessian(rows())
    for iterations in (1, 4, 60):
        found = sparse_plus_lowrank(W, H, Pattern.parse(text), 0, iterations=iterations)
        expected = slowly(W, H.damped, Pattern.parse(text), 0, iterations)
        assert torch.equal(found.mask, expected.mask)
        assert difference(found.S, expected.S) < 1e-8
        assert (found.L == 0).all()


@pytest.mark.parametrize(("text", "rank"), [("2:4", 1), ("50%", 4)])
def test_the_first_iteration_is_the_formulas_with_a_low_rank_too(monkeypatch, text, rank):
    """With as many steps of subspace iteration as it takes to find the directions exactly."""
    monkeypatch.setattr("compress.numerics.admm.START_STEPS", 400)
    W, H = random(M, N), hessian(rows())
    found = sparse_plus_lowrank(W, H, Pattern.parse(text), rank, iterations=1)
    expected = slowly(W, H.damped, Pattern.parse(text), rank, 1)
    assert torch.equal(found.mask, expected.mask)
    assert difference(found.S, expected.S) < 1e-8
    assert difference(found.L, expected.L) < 1e-8


@EVERY_PATTERN
def test_its_mask_is_better_than_those_of_others_with_their_best_weights(text):
    W, H, pattern = random(M, N, seed=9), hessian(rows()), Pattern.parse(text)
    found = sparse_plus_lowrank(W, H, pattern, 0, iterations=ITERATIONS)
    _, swept = sweep(W, H, pattern=pattern)
    masks = (keep_mask(W.abs(), pattern, by_row=False), keep_mask(wanda(W, H.second), pattern), swept)
    others = [error(W, least_squares(W, mask, H.damped), H.damped) for mask in masks]
    assert error(W, least_squares(W, found.mask, H.damped), H.damped) < 0.97 * min(others)


@pytest.mark.parametrize("rank", [0, 2])
def test_dead_inputs_and_fewer_tokens_than_inputs(rank):
    W = random(M, N)
    for X, text in itertools.product((rows(dead=(0, 5, 6, 31)), rows()[:7]), ("2:4", "50%")):
        H = hessian(X)
        found = sparse_plus_lowrank(W, H, Pattern.parse(text), rank, iterations=ITERATIONS)
        counted(found.mask, text)
        assert torch.isfinite(found.S + found.L).all()
        cut = W * keep_mask(wanda(W, H.second), Pattern.parse(text))
        assert error(W, found.S + found.L, H.damped) < error(W, cut, H.damped)


@pytest.mark.parametrize(("text", "chunk"), [("2:4", 1), ("50%", 3 * N)])
def test_weights_together_and_in_chunks_are_split_as_if_alone(monkeypatch, text, chunk):
    H, ranks = hessian(rows()), [1, 2, 3]
    weights = [random(m, N, seed=m) for m in (5, M, 20)]
    pattern, pairs = Pattern.parse(text), zip(weights, ranks, strict=True)
    alone = [sparse_plus_lowrank(W, H, pattern, rank, iterations=20) for W, rank in pairs]
    monkeypatch.setattr("compress.numerics.admm.CHUNK", chunk)
    for found, expected in zip(split_together(weights, H, pattern, ranks, iterations=20), alone, strict=True):
        assert torch.equal(found.mask, expected.mask)
        assert difference(found.S, expected.S) < 1e-9
        assert difference(found.L, expected.L) < 1e-9
