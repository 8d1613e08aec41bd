"""Steps of grids against trying very many."""

from typing import Any

import pytest
import torch
from torch import Tensor

from compress.numerics.grids import Grid, QuantizationArgs
from compress.numerics.steps import finer_inputs, make_grid
from matrices import args_of, random

DENSE = 20_000  # steps that the slow search tries
WIDTHS = (2, 8)
EVERY_WIDTH = pytest.mark.parametrize("bits", WIDTHS)
METHODS = ("absmax", "slim", "mse")


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 1


def laplace(*shape: int, seed: int = 0) -> Tensor:
    u = uniform(*shape, seed=seed)
    return -u.sign() * torch.log1p(-u.abs())


def student(*shape: int, seed: int = 0, freedom: int = 2) -> Tensor:
    """Heavy tails: with 2 degrees of freedom there is no variance."""
    spread = random(freedom, *shape, seed=seed + 1000).square().mean(0).sqrt()
    return random(*shape, seed=seed) / spread


DRAWS = {"gauss": random, "laplace": laplace, "student 2": student}
EVERY_DRAW = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)


def errors(pieces: Tensor, step: Tensor, args: QuantizationArgs) -> Tensor:
    """Of pieces (pieces, weights), each by its steps (pieces, steps)."""
    w, s = pieces[:, None, :], step[:, :, None]
    return ((w / s).round_().clamp_(args.lowest, args.highest).mul_(s).sub_(w)).square_().sum(-1)


def least_by_trying(pieces: Tensor, args: QuantizationArgs, *, count: int = DENSE) -> Tensor:
    """The least error of `count` steps up to one with which no weight is clipped and the largest is a small code."""
    largest = pieces.abs().amax(-1, keepdim=True) / args.highest
    shares = torch.linspace(2 / count, 2, count, dtype=torch.float64)
    chunks = shares.split(max(2**18 // pieces.numel(), 1))
    return torch.cat([errors(pieces, largest * chunk, args) for chunk in chunks], dim=1).amin(-1)


def lost(W: Tensor, grid: Grid) -> float:
    return float((grid.nearest(W) - W).square().sum())


def made(
    W: Tensor, bits: int, method: Any, group: int | str = "channel", *, symmetric: bool = True, **options: Any
) -> Grid:
    return make_grid(W, args_of(bits, group, symmetric=symmetric), method=method, **options)


# In 8 bits the error has many minima that are nearly as good, and the search may end in another than the least.
NEAR = {2: 1.001, 3: 1.001, 4: 1.001, 8: 1.08}


@EVERY_WIDTH
@EVERY_DRAW
def test_slim_is_as_good_as_the_best_of_very_many_steps(draw, bits):
    W, args = draw(30, 41, seed=bits), args_of(bits)
    least = least_by_trying(W.reshape(1, -1), args)
    assert lost(W, made(W, bits, "slim", "tensor")) <= NEAR[bits] * float(least)


@EVERY_DRAW
def test_mse_is_nearly_as_good_for_groups_of_64(draw):
    pieces, args = draw(40, 64, seed=4), args_of(4)
    found = errors(pieces, made(pieces, 4, "mse").step, args)[:, 0]
    assert found.sum() <= 1.01 * least_by_trying(pieces, args, count=2000).sum()


@EVERY_WIDTH
def test_absmax_with_zero_points_spans_from_the_least_to_the_largest_weight(bits):
    W = random(5, 20) + 1
    grid = made(W, bits, "absmax", symmetric=False)
    for row in range(5):
        low, high = min(0.0, float(W[row].min())), max(0.0, float(W[row].max()))
        assert float(grid.step[row]) == pytest.approx((high - low) / (2**bits - 1))
    assert torch.equal(grid.zero, grid.zero.round())
    # By up to half a step the ends are missed, as 0 is to have a code.
    assert ((grid.nearest(W) - W).abs() <= grid.step * (1 + 1e-9)).all()


@pytest.mark.parametrize("method", METHODS)
def test_each_piece_has_the_step_that_it_has_alone(method):
    W = student(3, 22)
    for group in (8, 11, 22, 5):
        grid = made(W, 4, method, group)
        assert grid.step.shape == (3, -(-22 // group))
        for row in range(3):
            for index, start in enumerate(range(0, 22, group)):
                alone = made(W[row : row + 1, start : start + group], 4, method, "tensor")
                assert float(grid.step[row, index]) == pytest.approx(float(alone.step), rel=1e-9)
    assert torch.equal(made(W, 4, method, "channel").step, made(W, 4, method, 22).step)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_steps_come_back_exactly_from_the_dtype_that_they_are_stored_in(method, stored):
    W = student(6, 48)
    for symmetric in (True, False):
        grid = made(W, 4, method, 16, stored=stored, symmetric=symmetric)
        assert grid.step.dtype == torch.float64
        assert torch.equal(grid.step.to(stored).double(), grid.step)
        unstored = made(W, 4, method, 16, symmetric=symmetric)
        assert (grid.step / unstored.step - 1).abs().max() <= torch.finfo(stored).eps
        assert lost(W, grid) <= 1.1 * lost(W, unstored)


def test_finer_inputs_are_those_with_the_largest_product_of_means():
    W, mean_abs = random(30, 250), random(250, seed=1).abs()
    finer = finer_inputs(W, mean_abs)
    score = [float(mean_abs[j]) * sum(abs(float(w)) for w in W[:, j]) for j in range(250)]
    assert finer.unique().tolist() == [1.0, 2.0]
    assert set((finer == 2).nonzero()[:, 0].tolist()) == set(sorted(range(250), key=lambda j: -score[j])[:2])
