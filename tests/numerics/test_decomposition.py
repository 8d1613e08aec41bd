"""A weight as sparse, on a grid and low rank: the paper's order written out, and what every combination keeps to."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.numerics.decomposition import (
    DAMPING,
    Adapting,
    Decomposed,
    Decomposition,
    Pruner,
    Pruning,
    Rounding,
    decompose_together,
)
from compress.numerics.lowrank import fit_adapter
from compress.numerics.moments import Hessian, InputMoments
from compress.numerics.sparsity import Pattern
from compress.numerics.sweep import descend, rescaled, sweep
from matrices import args_of, difference, measured, random, rows

M, N, TOKENS = 12, 32, 300
FEW = 16  # inputs, where every combination is made
WHERE = "block 3 mlp.down_proj"
PRUNERS: tuple[Pruner, ...] = ("magnitude", "wanda", "sparsegpt", "admm")


def pruning(method: Pruner, text: str = "2:4", *, iterations: int = 200) -> Pruning:
    return Pruning(method=method, pattern=Pattern.parse(text), iterations=iterations)


NEAREST = Rounding(args=args_of(4), steps="mse", sweeps=False)
SWEPT = Rounding(args=args_of(4), steps="mse", sweeps=True)
COARSE = dataclasses.replace(SWEPT, steps="absmax")
ROUNDINGS = (
    None,
    dataclasses.replace(NEAREST, args=args_of(4, "tensor"), steps="absmax"),
    dataclasses.replace(NEAREST, args=args_of(4, 5), steps="slim"),
    dataclasses.replace(NEAREST, args=args_of(4, symmetric=False), stored=torch.bfloat16),
    COARSE,
    dataclasses.replace(COARSE, args=args_of(2, 12, symmetric=False)),
    dataclasses.replace(COARSE, args=args_of(4, 5), actorder=True, stored=torch.float16),
    dataclasses.replace(COARSE, args=args_of(8, type="float")),
)
SLIM = Adapting(method="slim", rank=2)
ADAPTINGS = (None, Adapting(method="naive", rank=2), SLIM, Adapting(method="whitened", rank=2, rounds=2))


def decompose(W: Tensor, moments: InputMoments, how: Decomposition, **options: Any) -> Decomposed:
    (found,) = decompose_together([W], moments, [how], **options, names=[WHERE])
    return found


def made(W: Tensor, X: Tensor, how: Decomposition, *, centered: bool = False, single: bool = False) -> Decomposed:
    dtype = torch.float32 if single else torch.float64
    return decompose(W, measured(X), how, centered=centered, dtype=dtype)


def missed(W: Tensor, found: Decomposed, X: Tensor) -> Tensor:
    """Of the outputs, (tokens, m)."""
    given = X @ found.product.T
    return X @ W.T - (given if found.shift is None else given + found.shift)


def combinations() -> Iterator[tuple[Decomposition, str]]:
    for pruner, text in [(None, ""), *((method, "2:4") for method in PRUNERS), ("sparsegpt", "50%"), ("admm", "50%")]:
        for quantize, adapt in itertools.product(ROUNDINGS, ADAPTINGS):
            prune = None if pruner is None else pruning(pruner, text, iterations=6)
            yield Decomposition(prune=prune, quantize=quantize, adapt=adapt, polish=1), text


def keeps_to_mask_and_grid(found: Decomposed, how: Decomposition, text: str) -> None:
    assert torch.isfinite(found.product).all()
    assert (found.mask is None) == (how.prune is None)
    if found.mask is not None:
        assert (found.S[~found.mask] == 0).all()
        if text == "2:4":
            assert (found.mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()
        else:
            assert found.mask.sum() == found.mask.numel() / 2
    assert (found.grid is None) == (how.quantize is None)
    if found.grid is not None and how.quantize is not None:
        assert found.grid.kind == how.quantize.args
        assert (found.grid.zero is None) == how.quantize.args.symmetric
        if how.quantize.stored is not None:
            assert torch.equal(found.grid.step.to(how.quantize.stored).double(), found.grid.step)
        assert torch.equal(found.grid.nearest(found.S), found.S)
        assert torch.equal(found.grid.values(found.grid.codes(found.S)), found.S)
    assert (found.adapter is None) == (how.adapt is None)
    if found.adapter is not None and how.adapt is not None:
        assert found.adapter.B.shape == (found.S.shape[0], how.adapt.rank)
        assert torch.equal(found.product, found.S + found.adapter.B @ found.adapter.A)
    else:
        assert torch.equal(found.product, found.S)


def some(first: int) -> Iterator[tuple[Decomposition, str]]:
    """One of five, so that each two of their parts come together."""
    return itertools.islice(combinations(), first, None, 5)


def test_combinations_keep_to_mask_and_grid():
    W, X = random(4, FEW), rows(FEW)
    moments, before = measured(X), W.clone()
    for how, text in some(0):
        found = decompose(W, moments, how)
        keeps_to_mask_and_grid(found, how, text)
        assert found.shift is None
    assert torch.equal(W, before)


@pytest.mark.unchecked
def test_a_bias_keeps_the_mean_of_the_outputs():
    W, X = random(4, FEW), rows(FEW)
    for index, (how, text) in enumerate(some(2)):
        found = made(W, X, how, centered=True, single=index % 2 == 1)
        keeps_to_mask_and_grid(found, how, text)
        assert difference(missed(W, found, X).mean(0), torch.zeros(4).double()) < 1e-11
        assert difference(found.shift, (W - found.product) @ X.mean(0)) < 1e-11


@pytest.mark.parametrize("sweeps", [False, True], ids=["nearest", "swept"])
def test_finer_inputs_are_on_a_grid_twice_as_fine(sweeps):
    W, X = random(M, 200), rows(200)
    quantize = dataclasses.replace(SWEPT if sweeps else NEAREST, important_inputs=True, args=args_of(4, "tensor"))
    how = Decomposition(prune=pruning("wanda"), quantize=quantize, adapt=SLIM)
    found = made(W, X, how)
    keeps_to_mask_and_grid(found, how, "2:4")
    score = X.abs().mean(0) * W.abs().mean(0)
    fine = found.grid.finer == 2
    assert int(fine.sum()) == 2
    if not sweeps:
        assert score[fine].min() > score[~fine].max()
    halves = found.S[:, fine] / found.grid.step * 2
    assert difference(halves, halves.round()) < 1e-9
    assert (halves.round() % 2 == 1).any()


@pytest.mark.parametrize("adapted", [False, True])
def test_sparsegpt_with_gptq_is_one_sweep_then_descent_then_the_adapter(adapted):
    W, X = random(M, N), rows()
    adapt = SLIM if adapted else None
    found = made(W, X, Decomposition(prune=pruning("sparsegpt"), quantize=SWEPT, adapt=adapt, polish=3))
    H = Hessian(X.T @ X / len(X), DAMPING, WHERE)
    first = made(W, X, Decomposition(prune=pruning("sparsegpt"), quantize=SWEPT)).grid
    S, mask = sweep(W, H, grid=first, pattern=Pattern.parse("2:4"))
    for _ in range(3):
        S, first = rescaled(S, W, H, first)
        S = descend(S, W, H, grid=first, mask=mask, rounds=1)
    assert difference(found.grid.step, first.step) < 1e-12
    assert torch.equal(found.mask, mask)
    assert difference(found.S, S) < 1e-12
    if adapted:
        expected = fit_adapter("slim", W - S, measured(X), 2, centered=False, name=WHERE)
        assert difference(found.adapter.product, expected.product) < 1e-10


def test_each_round_fits_the_weights_to_what_the_adapter_leaves_and_the_adapter_to_what_they_do():
    W, X = random(M, N), rows()
    found = made(W, X, Decomposition(quantize=SWEPT, adapt=Adapting(method="whitened", rank=2, rounds=3)))
    rest, moments = W, measured(X)
    for _ in range(3):
        once = made(rest, X, Decomposition(quantize=SWEPT))
        adapter = fit_adapter("whitened", W - once.S, moments, 2, centered=False, name=WHERE)
        rest = W - adapter.product
    assert difference(found.S, once.S) < 1e-12
    assert difference(found.product, once.S + adapter.product) < 1e-10


@pytest.mark.parametrize(
    ("prune", "group"),
    [(None, "tensor"), (pruning("admm", iterations=12), "channel"), (pruning("sparsegpt", "50%"), 8)],
)
def test_weights_with_the_same_inputs_are_decomposed_together_as_if_alone(prune, group):
    moments, weights = measured(rows()), [random(m, N, seed=m) for m in (5, M)]
    quantize = dataclasses.replace(COARSE, args=args_of(4, group))
    hows = [
        Decomposition(prune=prune, quantize=quantize, adapt=Adapting(method="whitened", rank=rank, rounds=2), polish=1)
        for rank in (1, 3)
    ]
    together = decompose_together(weights, moments, hows, names=["one", "other"])
    for W, how, found in zip(weights, hows, together, strict=True):
        alone = decompose(W, moments, how)
        assert float((found.S - alone.S).abs().max()) < 1e-9
        assert float((found.product - alone.product).abs().max()) < 1e-9
