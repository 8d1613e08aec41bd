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
    return step.clamp_min(torch.finfo(stored).tiny).to(stored).to(step.dtype)


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


CANDIDATES = 256  # steps tried for the least error, evenly by ratio
STARTS = 4  # of them, the best are brought to the minimum beside them
AT_ONCE = 2**22  # weights: what is made of them beside is a few times as large
SMALLEST = 1 / 64  # of the largest weight: no step whose grid ends below it is tried


def least_error_steps(pieces: Float[Tensor, "r g w"], numbers: Numbers) -> Float[Tensor, "r g"]:
    """The steps of least squared error, clipping included.

    With the weights sorted and summed up once, the exact error of a step takes one search for each of the grid's
    2^b - 1 boundaries. Of the best steps tried each is then brought to a minimum: the codes that a step gives have a
    best step of their own, which gives codes no worse, and so on until nothing changes.
    """
    rows, groups, weights = pieces.shape
    chunks = pieces.reshape(rows * groups, weights).split(max(AT_ONCE // weights, 1))
    step = torch.cat([least_error_of(chunk.double(), numbers) for chunk in chunks])
    return step.view(rows, groups).to(pieces.dtype)


def least_error_of(flat: Float64[Tensor, "pieces w"], numbers: Numbers) -> Float64[Tensor, "pieces"]:
    sums = SortedSums.of(flat)
    highest = flat.abs().amax(-1) / max(numbers.highest, 1.0)
    ratios = torch.logspace(math.log2(SMALLEST), math.log2(1.05), CANDIDATES, base=2.0, dtype=torch.float64)
    tried = torch.stack([sums.error(positive(highest * ratio), numbers) for ratio in ratios.tolist()])
    best = positive(highest)
    least = sums.error(best, numbers)
    for place in tried.topk(STARTS, dim=0, largest=False).indices:
        step = positive(highest * ratios.to(highest.device)[place])
        for _ in range(64):
            better = sums.best_step(step, numbers)
            if torch.equal(better, step):
                break
            step = better
        error = sums.error(step, numbers)
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    return best


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
