"""Choose the step of a grid for the weights that share it.

    absmax  the largest weight lies on the grid's end
    slim    SLiM-Quant^W (arXiv 2410.09615, section 3.1): least error of rounding and clipping together
    mse     the same error, over fewer steps, from a fifth of that of `absmax` on: for groups and channels

SLiM's own code takes for the rounding error that of rounding down on a grid twice as fine, and looks for the minimum in
a histogram; ours is the error of the grid that is stored. A step is tried by its codes: it is judged by the
error of the best step for these codes, which has a closed form (as k-means moves a center to the mean of its points).
So few steps have to be tried.

A piece is the weights that share a step: pieces (groups, weights, rows) have steps (groups, rows). Rows are last, so
that sums over a piece's weights are sums of vectors.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from compress.numerics.grids import E2M1, FLOAT4_STEPS, FLOAT8, SIDE, Grid, QuantizationArgs

Pieces = Float[Tensor, "g w r"]
Steps = Float[Tensor, "g r"]

StepMethod = Literal["absmax", "slim", "mse"]


def make_grid(
    W: Float[Tensor, "m n"],
    args: QuantizationArgs,
    *,
    method: StepMethod,
    stored: torch.dtype | None = None,
    finer: Float[Tensor, "n"] | None = None,
    divisor: float = 1.0,
) -> Grid:
    """Make a grid for W, computed in W's dtype, its steps rounded to the dtype that they are `stored` in.

    finer: what inputs' weights are multiplied by before they are rounded; the step is chosen without it.
    divisor: of steps, once they are rounded.
    """
    pieces, is_block = pieces_of(W, args), args.strategy == "block"
    step, zero = (pieces.abs().amax(1) / args.highest, None) if args.symmetric else spread_steps(pieces, args)
    if method != "absmax" and stored is not None and stored in FLOAT4_STEPS.values():
        step = stored_steps(pieces, args, step, stored, divisor)
    elif method != "absmax":
        step = searched_steps(pieces, args, step, zero, SEARCHES[method])
    step = rounded(positive(step), stored, divisor).T.contiguous()
    if is_block:
        step = step.repeat_interleave(SIDE, 0)[: len(W)]
    size = SIDE if is_block else args.group_size or W.shape[1]
    return Grid(args, size, step, None if zero is None else zero.T.contiguous(), finer=finer, divisor=divisor)


def pieces_of(W: Float[Tensor, "m n"], args: QuantizationArgs) -> Float[Tensor, "groups weights rows"]:
    """Split W into pieces that share a step, the last group padded with zeros; of blocks a row is all their rows."""
    if args.strategy == "tensor":
        return W.reshape(1, -1, 1)
    if args.strategy == "block":
        filled = torch.nn.functional.pad(W, (0, -W.shape[1] % SIDE, 0, -len(W) % SIDE))
        blocks = filled.view(len(filled) // SIDE, SIDE, -1, SIDE)
        return blocks.permute(2, 1, 3, 0).flatten(1, 2)
    size = args.group_size or W.shape[1]
    filled = torch.nn.functional.pad(W.T, (0, 0, 0, -W.shape[1] % size))
    return filled.contiguous().view(-1, size, len(W))


def positive(step: Tensor) -> Tensor:
    """Replace zero steps by 1; the codes of such a piece are zeros."""
    return torch.where(step > 0, step, torch.ones_like(step))


def rounded(step: Tensor, stored: torch.dtype | None, divisor: float = 1.0) -> Tensor:
    """Round to the stored dtype, never to 0, over a divisor."""
    if stored is None:
        return step
    smallest = torch.finfo(stored).tiny * torch.finfo(stored).eps
    return (step * divisor).clamp_min(smallest).to(stored).to(step.dtype) / divisor


def shared_divisor(largest: float) -> float:
    """The divisor of the 8-bit steps of 4-bit floats for matrices whose largest weight this is.

    A power of two: with it every weight is exact in bfloat16 and float32. The largest step lies in the second octave
    from the top, so that it can still grow.
    """
    if not 0 < largest < math.inf:
        return 1.0
    top = torch.finfo(FLOAT8).max / 2 * E2M1[-1]
    return 2.0 ** min(max(math.floor(math.log2(top / largest)), -100), 100)


def spread_steps(pieces: Pieces, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """Asymmetric steps from the least to the largest weight, 0 included, and the zero points."""
    low, high = pieces.amin(1).clamp_max(0), pieces.amax(1).clamp_min(0)
    step = (high - low) / (args.highest - args.lowest)
    zero = (args.lowest - low / positive(step)).round_().clamp_(args.lowest, args.highest)
    return step, zero


@dataclass(frozen=True)
class Search:
    """Settings of the search for steps.

    coarse: steps tried from `low` to `high`, evenly spaced by ratio. fine: steps tried around the best of these.
    low, high: in units of the step of `absmax`. low None: the step that puts a third of the mean weight, zeros left
        out, on the grid's end; no smaller one is best, as every weight would gain by a larger one.
    """

    coarse: int
    fine: int
    low: float | None
    high: float


SEARCHES = {
    "mse": Search(coarse=10, fine=8, low=0.2, high=1.0),
    "slim": Search(coarse=64, fine=32, low=None, high=1.05),
}


def searched_steps(pieces: Pieces, args: QuantizationArgs, full: Steps, zero: Steps | None, search: Search) -> Steps:
    """Search the best step of each piece, never with a larger error than `full`, the step of `absmax`.

    In up to 4 bits `slim` comes within 0.1% of the least error for pieces of 64 weights on; in 8 bits, where many steps
    are nearly as good, within a few percent.
    """
    full = positive(full)
    mean = pieces.abs().sum(1) / (pieces != 0).sum(1).clamp_min(1)
    low = search.low * full if search.low else positive(mean / (-3 * args.lowest))
    start, ratio, gap = low.log2(), (search.high * full / low).log2_(), 1 / (search.coarse - 1)
    trials, place = StepTrials(pieces, args, zero), torch.ones_like(full)
    trials.test(full)
    for number in reversed(range(search.coarse)):
        better = trials.test((start + ratio * (number * gap)).exp2_())
        place = torch.where(better, number * gap, place)
    for number in range(1, search.fine + 1):
        distance = gap * (2 * number / (search.fine + 1) - 1)
        trials.test((start + ratio * (place + distance)).exp2_())
    trials.test(trials.best)
    return trials.best


def stored_steps(pieces: Pieces, args: QuantizationArgs, full: Steps, stored: torch.dtype, divisor: float) -> Steps:
    """Search the best step of each piece among the few numbers that can be stored about `full`, the step of `absmax`.

    4-bit floats have a wide gap below the largest: larger steps than `full` are tried too, with which the largest
    weight becomes 4 in place of 6.
    """
    trials = StepTrials(pieces, args, None, exact=True)
    nearest = (rounded(positive(full), stored, divisor) * divisor).to(stored).view(torch.uint8).int()
    places, last = (range(-4, 8), 126) if stored == FLOAT8 else (range(-1, 2), 254)
    for place in places:  # the codes of positive numbers are in their order
        code = (nearest + place).clamp(1, last).to(torch.uint8)
        trials.test(code.view(stored).to(full.dtype) / divisor)
    return trials.best


CHUNK = 2**17  # weights that are rounded at a time: what is computed from them stays in the cache


class StepTrials:
    """The best step so far of each piece, `best` (groups, rows), and its `error`.

    zero: the code of 0; None for 0 itself. exact: a step that is tried is not moved to the best one for its codes.
    """

    def __init__(self, pieces: Pieces, args: QuantizationArgs, zero: Steps | None, *, exact: bool = False) -> None:
        groups, weights, rows = pieces.shape
        self.pieces, self.args, self.zero, self.exact = pieces, args, zero, exact
        self.best = pieces.new_ones(groups, rows)
        self.error = torch.full_like(self.best, torch.inf)
        self.groups_at_once, self.weights_at_once = max(CHUNK // (weights * rows), 1), max(CHUNK // rows, 1)
        size = self.groups_at_once * min(self.weights_at_once, weights) * rows
        self.buffers = [pieces.new_empty(size) for _ in range(3)]

    def test(self, step: Steps) -> Bool[Tensor, "g r"]:
        """Try the best step for the codes that `step` gives, and tell where it is better than all before."""
        lost, gain, curvature = (torch.zeros_like(step) for _ in range(3))
        for start in range(0, len(step), self.groups_at_once):
            groups = slice(start, start + self.groups_at_once)
            zero = None if self.zero is None else self.zero[groups, None]
            for part in self.pieces[groups].split(self.weights_at_once, dim=1):
                codes, missed, product = (buffer[: part.numel()].view(part.shape) for buffer in self.buffers)
                torch.div(part, step[groups, None], out=codes)
                if zero is not None:
                    codes.add_(zero)
                self.args.nearest_(codes)
                if zero is not None:
                    codes.sub_(zero)
                torch.addcmul(part, codes, step[groups, None], value=-1, out=missed)
                gain[groups] += torch.mul(codes, missed, out=product).sum(1)
                lost[groups] += missed.square_().sum(1)
                curvature[groups] += codes.square_().sum(1)
        move = torch.zeros_like(step) if self.exact else torch.where(curvature > 0, gain / curvature, 0)
        error = lost - move * gain
        better = error < self.error
        self.best = torch.where(better, step + move, self.best)
        self.error = torch.where(better, error, self.error)
        return better


def finer_inputs(
    W: Float[Tensor, "m n"], mean_abs: Float[Tensor, "n"], *, share: float = 0.01, factor: float = 2.0
) -> Float[Tensor, "n"]:
    """SLiM-Quant^O: the inputs whose mean |x| times mean |w| is largest are rounded on a grid `factor` times finer."""
    score = mean_abs * W.abs().mean(0)
    finer = torch.ones_like(score)
    finer[score.topk(int(share * len(score))).indices] = factor
    return finer
