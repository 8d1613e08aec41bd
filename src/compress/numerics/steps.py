"""How the step of a grid is chosen for the weights that share it.

    absmax  the largest weight lies on the grid's end
    slim    SLiM-Quant^W (arXiv 2410.09615, section 3.1): least error of rounding and clipping together, over all steps
    mse     the same error, by trying shares of the largest weight

SLiM's own code takes for the rounding error that of rounding down on a grid twice as fine, and looks for the minimum in
a histogram; ours is the error of the grid that is stored, and its least value (`least_error_steps`).

A piece is what shares a step: pieces (rows, groups, weights) give steps (rows, groups).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from compress.numerics.grids import Grid, Numbers, Sharing

StepMethod = Literal["absmax", "slim", "mse"]


def make_grid(
    W: Float[Tensor, "m n"],
    numbers: Numbers,
    *,
    group: Sharing,
    method: StepMethod,
    symmetric: bool = True,
    stored: torch.dtype | None = None,
    finer: Float[Tensor, "n"] | None = None,
) -> Grid:
    """A grid for W, its steps rounded to the dtype that they are `stored` in.

    finer: what inputs' weights are multiplied by before they are rounded; the step is chosen without it.
    """
    pieces, size = pieces_of(W, group), W.shape[1] if isinstance(group, str) else group
    if symmetric:
        step = {"absmax": absmax_steps, "slim": least_error_steps, "mse": searched_steps}[method](pieces, numbers)
        return Grid(numbers, size, rounded(positive(step), stored), finer=finer)
    step, low = (spread_steps if method == "absmax" else searched_spreads)(pieces, numbers)
    step = rounded(positive(step), stored)
    zero = (numbers.lowest - low / step).round().clamp(numbers.lowest, numbers.highest)
    return Grid(numbers, size, step, zero, finer=finer)


def pieces_of(W: Tensor, group: Sharing) -> Tensor:
    """(rows, groups, weights): what shares a step. Where the inputs do not divide, zeros fill the last group."""
    if group == "tensor":
        return W.reshape(1, 1, -1)
    size = W.shape[1] if isinstance(group, str) else group
    missing = -W.shape[1] % size
    filled = torch.nn.functional.pad(W, (0, missing)) if missing else W
    return filled.unflatten(1, (-1, size))


def positive(step: Tensor) -> Tensor:
    """A piece of zeros gets the step 1: its codes are zeros whatever it is."""
    return torch.where(step > 0, step, torch.ones_like(step))


def rounded(step: Tensor, stored: torch.dtype | None) -> Tensor:
    """As it comes back from a checkpoint, and never 0 there."""
    if stored is None:
        return step
    return step.clamp_min(torch.finfo(stored).tiny * torch.finfo(stored).eps).to(stored).to(step.dtype)


def absmax_steps(pieces: Float[Tensor, "r g w"], numbers: Numbers) -> Float[Tensor, "r g"]:
    return pieces.abs().amax(-1) / numbers.highest


def spread_steps(pieces: Float[Tensor, "r g w"], numbers: Numbers) -> tuple[Tensor, Tensor]:
    """Steps from the least to the largest weight, 0 among them, and the least."""
    low, high = pieces.amin(-1).clamp_max(0), pieces.amax(-1).clamp_min(0)
    return (high - low) / (numbers.highest - numbers.lowest), low


SHARES = tuple(1 - 0.0125 * i for i in range(64))  # of the largest weight, that `mse` tries


def searched_steps(pieces: Float[Tensor, "r g w"], numbers: Numbers) -> Float[Tensor, "r g"]:
    full = absmax_steps(pieces, numbers)
    best, least = full, torch.full_like(full, math.inf)
    for share in SHARES:
        step = positive(full * share)
        error = (numbers.nearest(pieces / step[..., None]) * step[..., None] - pieces).square().sum(-1)
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    return best


def searched_spreads(pieces: Float[Tensor, "r g w"], numbers: Numbers) -> tuple[Tensor, Tensor]:
    full, low = spread_steps(pieces, numbers)
    best, best_low, least = full, low, torch.full_like(full, math.inf)
    for share in SHARES:
        step = positive(full * share)
        zero = (numbers.lowest - low * share / step).round().clamp(numbers.lowest, numbers.highest)[..., None]
        codes = numbers.nearest(pieces / step[..., None] + zero)
        error = ((codes - zero) * step[..., None] - pieces).square().sum(-1)
        better = error < least
        best, best_low = torch.where(better, step, best), torch.where(better, low * share, best_low)
        least = torch.minimum(error, least)
    return best, best_low


EXACT = 1024  # weights: for smaller pieces every way that a step can round them is compared
CANDIDATES = 256  # steps tried for larger ones, evenly by ratio
STARTS = 8  # of them, beside the best is looked more closely,
LOOKS = 2  # so many times,
CLOSER = 16  # so many times as closely,
LLOYD = 4  # and so often their codes are then given their own best step
AT_ONCE = 2**22  # weights, each as often as it has codes: what is made of them beside is a few times as large


def least_error_steps(pieces: Float[Tensor, "r g w"], numbers: Numbers) -> Float[Tensor, "r g"]:
    """The steps of least squared error, clipping included.

    In small pieces the error has many minima, of which the least is found by comparing all; in larger ones it is smooth
    enough to look for it.
    """
    rows, groups, weights = pieces.shape
    find, each = (compared_steps, 2 ** (numbers.bits - 1)) if weights <= EXACT else (searched_least, 1)
    chunks = pieces.reshape(rows * groups, weights).split(max(AT_ONCE // (weights * each), 1))
    step = torch.cat([find(chunk.double(), numbers) for chunk in chunks])
    return step.view(rows, groups).to(pieces.dtype)


def compared_steps(flat: Float64[Tensor, "pieces w"], numbers: Numbers) -> Float64[Tensor, "pieces"]:
    """As the step shrinks a weight w gets the code c at |w| / (c - 1/2), and of c |w| and c^2 the sums grow: every way
    of rounding is met once. The best step for one is sum c |w| / sum c^2, and takes (sum c |w|)^2 / sum c^2 off."""
    size = flat.abs()[..., None]
    code = torch.arange(1, 1 - numbers.lowest, dtype=flat.dtype, device=flat.device)
    reached = (code <= numbers.highest) | (flat[..., None] < 0)
    order = torch.where(reached, size / (code - 0.5), -1.0).flatten(1).argsort(-1, descending=True)
    wc = torch.where(reached, size, 0.0).flatten(1).gather(1, order).cumsum(-1)
    cc = torch.where(reached, 2 * code - 1, 0.0).flatten(1).gather(1, order).cumsum(-1)
    best = (wc.square() / cc).argmax(-1, keepdim=True)
    return (wc / cc).gather(1, best)[:, 0]


def searched_least(flat: Float64[Tensor, "pieces w"], numbers: Numbers) -> Float64[Tensor, "pieces"]:
    """With the weights sorted and summed up once, the exact error of a step takes one search for each of the grid's
    2^b - 1 boundaries. Steps are tried by ratio, then more closely beside the best; last, codes get their best step."""
    sums, size = SortedSums.of(flat), flat.abs()
    best = positive(size.amax(-1) / numbers.highest)
    least = sums.error(best, numbers)
    # No grid that ends below a third of the mean is best: every weight would gain by a larger step.
    low, high = positive(size.mean(-1) / (-3 * numbers.lowest)), 1.05 * best
    places = torch.linspace(0, 1, CANDIDATES, dtype=flat.dtype, device=flat.device)
    tried = torch.stack([sums.error(between(low, high, place), numbers) for place in places])
    beside = torch.linspace(-1, 1, 2 * CLOSER + 1, dtype=flat.dtype, device=flat.device)
    for place in places[tried.topk(STARTS, dim=0, largest=False).indices]:
        apart = 1 / (CANDIDATES - 1)
        for _ in range(LOOKS):
            near = place + apart * beside[:, None]
            errors = torch.stack([sums.error(between(low, high, one), numbers) for one in near])
            place, apart = near.gather(0, errors.argmin(0)[None])[0], apart / CLOSER
        step = between(low, high, place)
        for _ in range(LLOYD):
            step = sums.best_step(step, numbers)
        error = sums.error(step, numbers)
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    return best


def between(low: Float64[Tensor, "pieces"], high: Float64[Tensor, "pieces"], place: Tensor) -> Tensor:
    """By ratio."""
    return low ** (1 - place) * high**place


@dataclass(frozen=True)
class SortedSums:
    """Sorted weights w (pieces, weights), sums of the first i of them, and of all of their squares."""

    w: Tensor
    total: Tensor
    squares: Tensor

    @classmethod
    def of(cls, flat: Tensor) -> "SortedSums":
        w = flat.sort(-1).values.contiguous()
        return cls(w, torch.nn.functional.pad(w.cumsum(-1), (1, 0)), w.square().sum(-1))

    def moments(self, step: Tensor, numbers: Numbers) -> tuple[Tensor, Tensor]:
        """Sums of w c and of c^2, c the codes of the weights."""
        codes = torch.arange(numbers.lowest, numbers.highest + 1, dtype=torch.float64, device=step.device)
        bounds = (codes[:-1] + 0.5) * step[:, None]
        ends = torch.searchsorted(self.w, bounds.contiguous())
        ends = torch.nn.functional.pad(ends, (1, 0))
        ends = torch.nn.functional.pad(ends, (0, 1), value=self.w.shape[-1])
        sums = self.total.gather(1, ends).diff(dim=-1)
        return (sums * codes).sum(-1), (ends.diff(dim=-1) * codes.square()).sum(-1)

    def error(self, step: Tensor, numbers: Numbers) -> Tensor:
        wc, cc = self.moments(step, numbers)
        return self.squares - 2 * step * wc + step.square() * cc

    def best_step(self, step: Tensor, numbers: Numbers) -> Tensor:
        wc, cc = self.moments(step, numbers)
        return torch.where((cc > 0) & (wc > 0), wc / cc.clamp_min(1), step)


def finer_inputs(
    W: Float[Tensor, "m n"], mean_abs: Float[Tensor, "n"], *, share: float = 0.01, factor: float = 2.0
) -> Float[Tensor, "n"]:
    """SLiM-Quant^O: the inputs whose mean |x| times mean |w| is largest are rounded on a grid `factor` times finer."""
    score = mean_abs * W.abs().mean(0)
    finer = torch.ones_like(score)
    finer[score.topk(int(share * len(score))).indices] = factor
    return finer
