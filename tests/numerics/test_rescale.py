"""Steps at their best for given codes: against brute force, group after group by hand, and never worse."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.numerics.grids import Grid
from compress.numerics.moments import Hessian
from compress.numerics.steps import make_grid
from compress.numerics.sweep import rescaled
from matrices import args_of

M, N = 6, 24


def problem(seed: int = 0) -> tuple[Tensor, Hessian]:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(M, N, generator=generator, dtype=torch.float64)
    X = torch.randn(60, N, generator=generator, dtype=torch.float64) @ torch.randn(
        N, N, generator=generator, dtype=torch.float64
    )
    return W, Hessian(X.T @ X / len(X), 0.01, "a test")


def error(W: Tensor, Q: Tensor, hessian: Hessian) -> float:
    return float(((W - Q) @ hessian.damped * (W - Q)).sum())


def grid_of(W: Tensor, group: int | str, *, bits: int = 3, symmetric: bool = True, **how: Any) -> Grid:
    return make_grid(W, args_of(bits, group, symmetric=symmetric), method="mse", **how)


GRIDS = {
    "a tensor": ("tensor", {}),
    "a channel": ("channel", {}),
    "groups": (8, {}),
    "groups that do not divide": (7, {}),
    "asymmetric": (8, {"symmetric": False}),
}


@pytest.mark.parametrize("name", GRIDS)
def test_the_same_codes_and_no_larger_error(name):
    granularity, how = GRIDS[name]
    W, H = problem()
    grid = grid_of(W, granularity, **how)
    Q = grid.nearest(W)
    found, better = rescaled(Q, W, H, grid)
    assert torch.equal(better.codes(found), grid.codes(Q))
    assert error(W, found, H) < error(W, Q, H)
    again, _ = rescaled(found, W, H, better)
    assert error(W, again, H) <= error(W, found, H) * (1 + 1e-12)


def test_groups_one_after_the_other_by_hand():
    W, H = problem(2)
    grid = grid_of(W, 8)
    Q, steps = grid.nearest(W), grid.step.clone()
    codes = Q / steps.repeat_interleave(8, 1)
    for group, row in itertools.product(range(3), range(M)):
        inputs = torch.arange(8 * group, 8 * group + 8)
        direction = torch.zeros(N, dtype=torch.float64)
        direction[inputs] = codes[row, inputs]
        rest = W[row] - (codes[row] * steps[row].repeat_interleave(8)) + direction * steps[row, group]
        # The least of ||rest - step direction||_H.
        steps[row, group] = (direction @ H.damped @ rest) / (direction @ H.damped @ direction)
    found, better = rescaled(Q, W, H, grid)
    torch.testing.assert_close(better.step, steps, rtol=1e-10, atol=0)
    torch.testing.assert_close(found, codes * steps.repeat_interleave(8, 1), rtol=1e-10, atol=1e-12)


def test_steps_are_those_that_are_stored():
    W, H = problem(4)
    grid = grid_of(W, 8, stored=torch.float16)
    found, better = rescaled(grid.nearest(W), W, H, grid, stored=torch.float16)
    assert torch.equal(better.step, better.step.half().double())
    assert torch.equal(found, better.nearest(found))


def test_a_step_does_not_run_away():
    """Codes that fit nothing would take it to zero or below."""
    W, H = problem(5)
    grid = grid_of(W, "channel")
    _, better = rescaled(-grid.nearest(W), W, H, grid)
    assert torch.equal(better.step, grid.step / 2)
