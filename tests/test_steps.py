"""Steps of grids against trying very many."""

import math

import pytest
import torch
from torch import Tensor

from compress.numerics.grids import Grid, Numbers, Sharing
from compress.numerics.steps import StepTrials, finer_inputs, make_grid, pieces_of

DENSE = 20_000  # steps that the slow search tries
WIDTHS = (2, 4, 8)
FLOATING = Numbers(8, floating=True)
EVERY_WIDTH = pytest.mark.parametrize("bits", WIDTHS)
METHODS = ("absmax", "slim", "mse")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.rand(*shape, dtype=torch.float64, generator=generator(seed)) - 1


def laplace(*shape: int, seed: int = 0) -> Tensor:
    u = uniform(*shape, seed=seed)
    return -u.sign() * torch.log1p(-u.abs())


def student(*shape: int, seed: int = 0, freedom: int = 2) -> Tensor:
    """Heavy tails: with 2 degrees of freedom there is no variance."""
    spread = random(freedom, *shape, seed=seed + 1000).square().mean(0).sqrt()
    return random(*shape, seed=seed) / spread


def student3(*shape: int, seed: int = 0) -> Tensor:
    return student(*shape, seed=seed, freedom=3)


DRAWS = {"gauss": random, "laplace": laplace, "uniform": uniform, "student 2": student, "student 3": student3}
EVERY_DRAW = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)


def errors(pieces: Tensor, step: Tensor, numbers: Numbers) -> Tensor:
    """Of pieces (pieces, weights), each by its steps (pieces, steps)."""
    w, s = pieces[:, None, :], step[:, :, None]
    return ((w / s).round_().clamp_(numbers.lowest, numbers.highest).mul_(s).sub_(w)).square_().sum(-1)


def least_by_trying(pieces: Tensor, numbers: Numbers, *, count: int = DENSE) -> Tensor:
    """The least error of `count` steps up to one with which no weight is clipped and the largest is a small code."""
    largest = pieces.abs().amax(-1, keepdim=True) / numbers.highest
    shares = torch.linspace(2 / count, 2, count, dtype=torch.float64)
    chunks = shares.split(max(2**18 // pieces.numel(), 1))
    return torch.cat([errors(pieces, largest * chunk, numbers) for chunk in chunks], dim=1).amin(-1)


def lost(W: Tensor, grid: Grid) -> float:
    return float((grid.nearest(W) - W).square().sum())


def made(W: Tensor, bits: int, method: str, group: Sharing = "channel", **options: object) -> Grid:
    return make_grid(W, Numbers(bits), group=group, method=method, **options)  # type: ignore[arg-type]


# ---- SLiM-Quant ----


# In 8 bits the error has many minima that are nearly as good, and the search may end in another than the least.
NEAR = {2: 1.001, 3: 1.001, 4: 1.001, 8: 1.08}


@EVERY_WIDTH
@EVERY_DRAW
def test_slim_is_as_good_as_the_best_of_very_many_steps(draw, bits):
    W, numbers = draw(30, 41, seed=bits), Numbers(bits)
    least = least_by_trying(W.reshape(1, -1), numbers)
    assert lost(W, made(W, bits, "slim", "tensor")) <= NEAR[bits] * float(least)


@pytest.mark.parametrize("bits", [2, 3, 4])
@EVERY_DRAW
@pytest.mark.parametrize("shape", [(12, 64), (4, 128), (2, 1000)], ids=str)
def test_slim_is_as_good_for_each_of_many_pieces(draw, bits, shape):
    pieces, numbers = draw(*shape, seed=bits), Numbers(bits)
    found = errors(pieces, made(pieces, bits, "slim").step, numbers)[:, 0]
    least = least_by_trying(pieces, numbers, count=5000)
    assert (found <= 1.01 * least).all()
    assert found.sum() <= NEAR[bits] * least.sum()


@pytest.mark.parametrize("bits", [3, 4])
@EVERY_DRAW
def test_mse_is_nearly_as_good_for_groups_of_64(draw, bits):
    pieces, numbers = draw(40, 64, seed=bits), Numbers(bits)
    found = errors(pieces, made(pieces, bits, "mse").step, numbers)[:, 0]
    assert found.sum() <= 1.01 * least_by_trying(pieces, numbers, count=2000).sum()


@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("chunk", [1, 50, 2**17])
def test_a_trial_takes_the_best_step_for_the_codes_of_the_one_that_is_tried(monkeypatch, chunk, zero):
    """In chunks of groups or of their weights: by least squares, piece by piece."""
    monkeypatch.setattr("compress.numerics.steps.CHUNK", chunk)
    pieces, numbers = random(3, 7, 5), Numbers(4)
    offset = torch.tensor([-2.0, 0.0, 3.0]).double()[:, None].expand(3, 5) if zero else None
    trials, best = StepTrials(pieces, numbers, offset), torch.full((3, 5), math.inf).double()
    for number, tried in enumerate((0.3, 0.2, 0.9, 0.25)):
        better = trials.test(torch.full((3, 5), tried).double())
        for group in range(3):
            for row in range(5):
                w, at = pieces[group, :, row], 0 if offset is None else offset[group, row]
                q = (w / tried + at).round().clamp(-8, 7) - at
                step = torch.linalg.lstsq(q[:, None], w[:, None]).solution[0, 0]
                error = (w - step * q).square().sum()
                assert bool(better[group, row]) == bool(error < best[group, row])
                if error < best[group, row]:
                    best[group, row] = error
                    assert float(trials.best[group, row]) == pytest.approx(float(step), rel=1e-9)
        assert torch.allclose(trials.error, best, rtol=1e-9)
        assert number > 0 or bool(better.all())


@pytest.mark.parametrize(
    ("shape", "draw", "bits"),
    [((520, 1000), uniform, 4), ((600, 1000), random, 8), ((520, 1000), uniform, 2)],
    ids=["520 bins", "600 bins", "520 bins, 2 bits"],
)
def test_slim_finds_the_minimum_for_numbers_of_bins_at_which_its_code_finds_none(shape, draw, bits):
    """Its histogram has a bin for every 1000 weights; divisible by 10, the least error may be in no bin it looks at."""
    W = draw(*shape, seed=1)
    found = made(W, bits, "slim", "tensor")
    shares = torch.linspace(0.4, 1.05, 30, dtype=torch.float64) * W.abs().max() / Numbers(bits).highest
    least = min(lost(W, Grid(found.numbers, found.group, share.view(1, 1))) for share in shares)
    assert lost(W, found) <= 1.001 * least


def test_slims_clipping_of_a_normal_distribution_is_that_of_theory():
    """The grid -8 .. 7 that is best for N(0, 1): by integrals over each cell, the last ones open."""

    def normal_error(step: float) -> float:
        bounds = [-math.inf, *((code + 0.5) * step for code in range(-8, 7)), math.inf]

        def moments(x: float) -> tuple[float, float, float]:
            """Of N(0, 1) up to x: 1, x, x^2."""
            if math.isinf(x):
                return (0.0, 0.0, 0.0) if x < 0 else (1.0, 0.0, 1.0)
            density, below = math.exp(-x * x / 2) / math.sqrt(2 * math.pi), (1 + math.erf(x / math.sqrt(2))) / 2
            return below, -density, below - x * density

        total = 0.0
        for code, low, high in zip(range(-8, 8), bounds[:-1], bounds[1:], strict=True):
            one, x, xx = (b - a for a, b in zip(moments(low), moments(high), strict=True))
            total += xx - 2 * code * step * x + (code * step) ** 2 * one
        return total

    best = min((0.2 + 0.0005 * i for i in range(600)), key=normal_error)
    W = random(1000, 1000, seed=3)
    found = made(W, 4, "slim", "tensor")
    assert float(found.step) == pytest.approx(best, rel=0.01)
    assert lost(W, found) / W.numel() == pytest.approx(normal_error(best), rel=0.01)


def test_a_weight_far_outside_is_clipped_when_that_is_best_and_kept_when_it_is_not():
    W, far = random(200, 200), random(200, 200)
    W[3, 4], far[3, 4] = 8.0, 1e5
    assert float(made(W, 4, "slim", "tensor").nearest(W)[3, 4]) < 4
    assert float(made(far, 4, "slim", "tensor").nearest(far)[3, 4]) == pytest.approx(1e5, rel=1e-9)


def test_the_sign_of_the_heavier_tail_has_the_code_more():
    """With 2 bits, -2 .. 1: a matrix and its negative have not the same steps, and both are the best."""
    W = student(1, 40).abs()
    for signed in (W, -W):
        found = made(signed, 2, "slim")
        assert lost(signed, found) <= float(least_by_trying(signed, Numbers(2))) * (1 + 1e-6)
    assert lost(-W, made(-W, 2, "slim")) < 0.9 * lost(W, made(W, 2, "slim"))


# ---- the other ways ----


@EVERY_WIDTH
@EVERY_DRAW
def test_no_search_is_worse_than_absmax(draw, bits):
    W = draw(6, 48, seed=bits)
    for group in ("tensor", "channel", 7):
        full, searched, least = (lost(W, made(W, bits, method, group)) for method in ("absmax", "mse", "slim"))
        assert searched <= full
        assert least <= full
        full, searched = (lost(W, made(W, bits, method, group, symmetric=False)) for method in ("absmax", "mse"))
        assert searched <= full


@EVERY_DRAW
def test_mse_is_never_worse_than_absmax_in_float8(draw):
    W = draw(6, 48)
    searched, full = (make_grid(W, FLOATING, group=16, method=method) for method in ("mse", "absmax"))
    assert lost(W, searched) <= lost(W, full)


@pytest.mark.parametrize("group", ["tensor", "channel", 5])
def test_absmax_puts_the_largest_weight_on_the_end(group):
    W = random(3, 15)
    for numbers in (Numbers(4), FLOATING):
        grid = make_grid(W, numbers, group=group, method="absmax")
        pieces = pieces_of(W, group)
        assert torch.allclose(grid.step.T * numbers.highest, pieces.abs().amax(1), rtol=1e-12)


@EVERY_WIDTH
def test_absmax_with_zero_points_spans_from_the_least_to_the_largest_weight(bits):
    W = random(5, 20) + 1
    grid = made(W, bits, "absmax", symmetric=False)
    for row in range(5):
        low, high = min(0.0, float(W[row].min())), max(0.0, float(W[row].max()))
        assert float(grid.step[row]) == pytest.approx((high - low) / (2**bits - 1))
    assert grid.zero is not None
    assert torch.equal(grid.zero, grid.zero.round())
    # By up to half a step the ends are missed, as 0 is to have a code.
    assert ((grid.nearest(W) - W).abs() <= grid.step * (1 + 1e-9)).all()


@EVERY_WIDTH
@pytest.mark.parametrize("method", ["absmax", "mse"])
def test_zero_points_are_better_for_weights_that_are_skewed(bits, method):
    W = random(8, 64).exp() - 0.5
    assert lost(W, made(W, bits, method, symmetric=False)) < 0.9 * lost(W, made(W, bits, method))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_weights_of_one_sign_with_zero_points_use_all_codes(sign):
    W = sign * (random(1, 400).abs() + 0.01)
    grid = made(W, 4, "absmax", symmetric=False)
    assert len(grid.codes(W).unique()) == 16


# ---- sharing ----


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


def test_pieces_are_what_shares_a_step_and_zeros_fill_the_last():
    W = random(2, 5)
    assert torch.equal(pieces_of(W, "tensor"), W.reshape(1, 10, 1))
    assert torch.equal(pieces_of(W, "channel"), W.T[None])
    pieces = pieces_of(W, 3)
    assert pieces.shape == (2, 3, 2)
    assert torch.equal(pieces[0], W[:, :3].T)
    assert torch.equal(pieces[1], torch.cat([W[:, 3:], torch.zeros(2, 1).double()], dim=1).T)


@EVERY_WIDTH
def test_finer_sharing_is_better(bits):
    W = student(8, 64)
    by_group, by_row, as_whole = (lost(W, made(W, bits, "slim", group)) for group in (16, "channel", "tensor"))
    assert by_group < by_row < as_whole


# ---- odd weights ----


@EVERY_WIDTH
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("method", METHODS)
def test_zeros_stay_zeros(method, symmetric, bits):
    nothing = torch.zeros(3, 8).double()
    W = torch.cat([random(1, 8), nothing])
    for group in ("tensor", "channel", 3):
        grid = made(W, bits, method, group, symmetric=symmetric)
        assert (grid.step > 0).all()
        assert torch.equal(grid.nearest(W)[1:], nothing)
        assert torch.equal(made(nothing, bits, method, group, symmetric=symmetric).nearest(nothing), nothing)


@EVERY_WIDTH
@pytest.mark.parametrize("value", [0.3, -4e5])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7)])
def test_weights_that_are_all_equal_are_exact(shape, value, bits):
    W = torch.full(shape, value, dtype=torch.float64)
    for group in ("tensor", "channel", 4):
        for method in METHODS:
            for symmetric in (True, False):
                grid = made(W, bits, method, group, symmetric=symmetric)
                assert lost(W, grid) <= 1e-24 * float(W.square().sum())


def test_constant_inputs_of_a_matrix_are_exact_and_do_not_disturb_others():
    """A group whose weights are all equal beside one whose weights are not."""
    W = torch.cat([torch.full((3, 8), 0.7, dtype=torch.float64), random(3, 8)], dim=1)
    for method in METHODS:
        grid = made(W, 4, method, 8)
        assert (grid.nearest(W)[:, :8] - 0.7).abs().max() < 1e-12
        assert torch.equal(grid.nearest(W)[:, 8:], made(W[:, 8:], 4, method, 8).nearest(W[:, 8:]))


# ---- as stored ----


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
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


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_small_weights_keep_their_accuracy_in_the_stored_dtype(stored):
    """8 bits of weights near 0.001 have steps near 1e-5, which float16 has only below its normal numbers."""
    W = 1e-3 * random(8, 256)
    assert lost(W, made(W, 8, "slim", 32, stored=stored)) <= 1.2 * lost(W, made(W, 8, "slim", 32))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_a_step_is_never_stored_as_0(stored):
    grid = made(1e-44 * random(2, 8), 4, "absmax", stored=stored)
    assert (grid.step > 0).all()
    assert torch.equal(grid.step.to(stored).double(), grid.step)


# ---- SLiM-Quant^O ----


def test_finer_inputs_are_those_with_the_largest_product_of_means():
    W, mean_abs = random(30, 250), random(250, seed=1).abs()
    finer = finer_inputs(W, mean_abs)
    score = [float(mean_abs[j]) * sum(abs(float(w)) for w in W[:, j]) for j in range(250)]
    assert finer.unique().tolist() == [1.0, 2.0]
    assert set((finer == 2).nonzero()[:, 0].tolist()) == set(sorted(range(250), key=lambda j: -score[j])[:2])


def test_the_step_is_chosen_without_regard_to_the_finer_inputs_which_are_rounded_better():
    W, finer = random(30, 200), torch.ones(200).double()
    finer[[5, 17]] = 2.0
    for method in METHODS:
        plain, fine = made(W, 4, method, "tensor"), made(W, 4, method, "tensor", finer=finer)
        assert torch.equal(plain.step, fine.step)
        assert torch.equal(plain.nearest(W)[:, finer == 1], fine.nearest(W)[:, finer == 1])
    plain, fine = made(W, 4, "absmax", "tensor"), made(W, 4, "absmax", "tensor", finer=finer)
    inside = (W.abs() < W.abs().max() / 2) & (finer == 2)
    assert (fine.nearest(W) - W)[inside].square().sum() < 0.5 * (plain.nearest(W) - W)[inside].square().sum()
