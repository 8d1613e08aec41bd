"""Grids of llama.cpp's block types: scales fitted to weights, within what a block can store.

    fit_blocks   scales and minima of all groups by weighted least squares, then in few bits of their block's
    polished     the same for codes that a sweep has found, and these again, by the full second moment of the inputs

Both hold everything else fixed and move one number to its best value, rounded to what is stored; the error is a
parabola in each of them. That scales are fixed before a sweep lets it take inputs in any order.

Dimensions: W (m, n), n inputs in blocks and groups of the type.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from jaxtyping import Bool, Float, Int32, UInt8
from torch import Tensor

from compress.numerics.block_types import Block, BlockType
from compress.numerics.grids import Grid
from compress.numerics.moments import Hessian
from compress.numerics.sweep import ColumnRounding, descended, in_order, spans

Weight = Float[Tensor, "m n"]
Groups = Float[Tensor, "G g m"]
PerGroup = Float[Tensor, "m G"]
PerBlock = Float[Tensor, "m B"]
Weighting = Float[Tensor, "G g 1"]

CHUNK = 2**18  # weights that scales are searched for at a time
TRIALS = 12  # scales for each end of the grid
FINE = 64  # steps of a grid; of finer ones the largest weight's place decides little
REFINEMENTS = 3  # rounds of scales for codes and codes for scales
SPAN = 256  # columns that changes are brought to one by one; to later ones by a product
SMALLEST = 2.0**-24  # of float16
LARGEST = 65504.0
TINY = 1e-30
Rule = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class BlockGrid(Grid):
    """A block type's grid. d: (m, blocks), and low, dmin or what is added. sc, mn: (m, groups), integers; or None."""

    kind: BlockType
    d: Float[Tensor, "m blocks"]
    low: Float[Tensor, "m blocks"] | None
    sc: Float[Tensor, "m groups"] | None
    mn: Float[Tensor, "m groups"] | None

    @classmethod
    def of(
        cls, kind: BlockType, d: Tensor, low: Tensor | None = None, sc: Tensor | None = None, mn: Tensor | None = None
    ) -> "BlockGrid":
        step, zero = d.repeat_interleave(kind.per_block, 1), None
        if sc is not None:
            step = step * sc
        if low is not None:
            zero = (-low if mn is None else low.repeat_interleave(kind.per_block, 1) * mn) / step
        return cls(kind.group, step, zero, kind=kind, d=d, low=low, sc=sc, mn=mn)

    @property
    def parts(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        return self.d, self.low, self.sc, self.mn

    def to(self, dtype: torch.dtype) -> "BlockGrid":
        return self.of(self.kind, *(none_or(Tensor.to, part, dtype) for part in self.parts))

    def rows(self, start: int, stop: int) -> "BlockGrid":
        return self.of(self.kind, *(none_or(Tensor.__getitem__, part, slice(start, stop)) for part in self.parts))

    @classmethod
    def stacked(cls, grids: Sequence[Any]) -> "BlockGrid":
        columns = zip(*(grid.parts for grid in grids), strict=True)
        parts: list[Any] = [None if part[0] is None else torch.cat(part) for part in columns]
        return cls.of(grids[0].kind, *parts)

    def dequantized(self, W: Weight) -> Weight:
        """W's nearest values as decoders compute them: in float32, the scale first."""
        single, per = self.to(torch.float32), self.kind.per_block
        values = self._codes(W).float().unflatten(1, (-1, self.group_size)) * single.step[..., None]
        if single.low is not None:
            low = single.low.repeat_interleave(per, 1)
            values = values + low[..., None] if single.mn is None else values - (low * single.mn)[..., None]
        return values.flatten(1)

    def encoded(self, W: Weight) -> UInt8[Tensor, "m bytes"]:
        """W's nearest values as the type's bytes, row by row."""
        kind, codes = self.kind, self._codes(W)
        if kind.table is None:
            q = codes - (0 if kind.name == "Q8_0" else kind.lowest)
        else:
            q = torch.bucketize(codes.contiguous(), codes.new_tensor(kind.table))
        sc, mn = (none_or(integers, part, kind.per_block) for part in (self.sc, self.mn))
        low = None if self.low is None else self.low.flatten()
        return kind.encode(Block(integers(q, kind.block), self.d.flatten(), low, sc, mn)).view(len(W), -1)


def none_or(function: Callable[..., Tensor], part: Tensor | None, *arguments: Any) -> Any:
    return None if part is None else function(part, *arguments)


def integers(x: Tensor, columns: int) -> Int32[Tensor, "_ columns"]:
    return x.reshape(-1, columns).to(torch.int32)


def fit_blocks(
    W: Weight, kind: BlockType, weights: Float[Tensor, "n"] | None = None, *, trials: int = TRIALS
) -> BlockGrid:
    """Fit the scales and minima of a block type to a weight.

    weights: of the inputs' squared errors; the diagonal of their second moment. trials: scales for each end of the
        grid; fewer than usual take less time and leave a few percent more error.
    """
    w = torch.ones_like(W[0]) if weights is None else weights.to(W.dtype)
    w = (w / w.mean().clamp_min(TINY)).clamp_min(1e-6).view(-1, kind.group, 1)
    rows = max(CHUNK // W.shape[1], 1)
    return BlockGrid.stacked(
        [fit_rows(in_order(part, None).unflatten(0, (-1, kind.group)), kind, w, trials) for part in W.split(rows)]
    )


def fit_rows(X: Groups, kind: BlockType, w: Weighting, trials: int) -> BlockGrid:
    """Rows are last, so that sums over a group's weights are sums of vectors."""
    scale, low = shifted_scales(X, kind, w, trials) if kind.has_min else (plain_scales(X, kind, w, trials), None)
    grid = in_blocks(kind, scale.T.contiguous(), None if low is None else low.T.contiguous())
    q, wX = codes_of(grid, X), w * X
    error = error_of_blocks(grid, q, X, w)
    for _ in range(REFINEMENTS if trials >= TRIALS else 1):
        new = moved(grid, q, wX, w)
        codes = codes_of(new, X)
        changed = error_of_blocks(new, codes, X, w)
        better = changed < error
        grid, error = chosen(better, new, grid), torch.minimum(changed, error)
        q = torch.where(better.T.repeat_interleave(kind.per_block, 0)[:, None], codes, q)
    return grid


def plain_scales(X: Groups, kind: BlockType, w: Tensor, trials: int) -> Float[Tensor, "G m"]:
    """The best scale of each group by itself; its sign puts either end of the grid on the largest weight."""
    largest = X.gather(1, X.abs().argmax(1, keepdim=True))[:, 0]
    ends = [kind.lowest, kind.highest] if kind.table is None else [kind.table[0], kind.table[-1]]
    reaches = torch.linspace(0.76, 1.26, trials).tolist()
    if kind.highest - kind.lowest > FINE:
        ends, reaches = ends[:1], [0.95, 1.0, 1.05]
    best, scale = torch.zeros_like(largest), torch.zeros_like(largest)
    q, wq = torch.empty_like(X), torch.empty_like(X)
    for end, reach in product(ends, reaches):
        kind.nearest_(torch.div(X, positive(largest / (end * reach))[:, None], out=q))
        torch.mul(w, q, out=wq)
        square, along = q.mul_(wq).sum(1).clamp_min_(TINY), wq.mul_(X).sum(1)
        gain = along.square() / square
        best, scale = (torch.where(gain > best, new, old) for new, old in ((gain, best), (along / square, scale)))
    return scale


def shifted_scales(X: Groups, kind: BlockType, w: Tensor, trials: int) -> tuple[Tensor, Tensor]:
    """The best scale and minimum of each group; the minimum as what is subtracted, or added without `mins`."""
    high, least = X.amax(1), X.amin(1)
    if kind.mins is not None:
        least = least.clamp_max(0)
    above, wX = X - least[:, None], w * X
    total, sx, sxx = w.sum(1), wX.sum(1), (wX * X).sum(1)
    best, scale, low = (torch.full_like(high, value) for value in (torch.inf, 0.0, 0.0))
    q, weighed = torch.empty_like(X), torch.empty_like(X)
    for reach in torch.linspace(-1.0, 1.0, trials).tolist():
        inverse = (kind.highest + reach) / positive(high - least)
        torch.mul(above, inverse[:, None], out=q).round_().clamp_(0, kind.highest)
        sqx = torch.mul(q, wX, out=weighed).sum(1)
        sq = torch.mul(q, w, out=weighed).sum(1)
        sqq = weighed.mul_(q).sum(1)
        det = total * sqq - sq.square()
        s = torch.where(det > 0, (total * sqx - sx * sq) / det, 0)
        b = torch.where(det > 0, (sqq * sx - sq * sqx) / det, sx / total)
        if kind.mins is not None:
            s, b = torch.where(b > 0, sqx / sqq.clamp_min(TINY), s), b.clamp_max(0)
        error = s * s * sqq + b * b * total + sxx + 2 * s * b * sq - 2 * s * sqx - 2 * b * sx
        better = error < best
        best, scale, low = (torch.where(better, new, old) for new, old in ((error, best), (s, scale), (b, low)))
    return scale, low if kind.mins is None else -low


def in_blocks(kind: BlockType, scale: PerGroup, low: PerGroup | None) -> BlockGrid:
    """Round scales and minima to what their blocks can store."""
    if kind.scales is None:
        return BlockGrid.of(kind, halved(scale), None if low is None else low.half().to(low.dtype))
    scales = scale.unflatten(1, (-1, kind.per_block))
    if kind.scales[0] < 0:  # the largest gets the end that reaches farther
        largest = scales.gather(2, scales.abs().argmax(2, keepdim=True))[..., 0]
        d = halved(largest / kind.scales[0])
    else:
        d = halved(scales.amax(2) / kind.scales[1])
    sc = never_zero(in_units(scale, d, kind.scales))
    if low is None or kind.mins is None:
        return BlockGrid.of(kind, d, None, sc)
    dmin = halved(low.unflatten(1, (-1, kind.per_block)).amax(2) / kind.mins)
    return BlockGrid.of(kind, d, dmin, sc, in_units(low, dmin, (0, kind.mins)))


def in_units(x: PerGroup, unit: PerBlock, limits: tuple[int, int]) -> PerGroup:
    """Round to whole multiples of a block's unit."""
    return (x / unit.repeat_interleave(x.shape[1] // unit.shape[1], 1)).round_().clamp_(*limits)


def halved(x: Tensor) -> Tensor:
    """Round to float16, never to 0."""
    rounded = x.clamp(-LARGEST, LARGEST).half().to(x.dtype)
    return torch.where(rounded == 0, SMALLEST, rounded)


def positive(x: Tensor) -> Tensor:
    return torch.where(x == 0, 1.0, x)


def never_zero(sc: Tensor) -> Tensor:
    """Replace 0: weights of such a group would have no codes."""
    return torch.where(sc == 0, 1, sc)


def chosen(better: Bool[Tensor, "m B"], new: BlockGrid, old: BlockGrid) -> BlockGrid:
    """The new numbers of blocks where they are better."""
    groups = better.repeat_interleave(old.kind.per_block, 1)
    parts = [
        None
        if before is None or now is None
        else torch.where(better if now.shape == better.shape else groups, now, before)
        for now, before in zip(new.parts, old.parts, strict=True)
    ]
    return BlockGrid.of(old.kind, *parts)  # type: ignore[arg-type]


def codes_of(grid: BlockGrid, X: Groups) -> Groups:
    q = X / per_group(grid.step)
    return grid.kind.nearest_(q if grid.zero is None else q.add_(per_group(grid.zero)))


def per_group(part: PerGroup) -> Float[Tensor, "G 1 m"]:
    return part.T.contiguous()[:, None]


def moved(grid: BlockGrid, q: Groups, wX: Groups, w: Weighting) -> BlockGrid:
    """Scales and minima at their best for the codes q. wX: w times the weights."""
    kind, wq = grid.kind, w * q
    total, sums, weighed = w.sum(1).T, wq.sum(1).T, wX.sum(1).T
    square, along = wq.mul_(q).sum(1).T, (wX * q).sum(1).T
    if grid.zero is not None:
        along = along + grid.zero * grid.step * sums
    ideal = along / square.clamp_min(TINY)
    if grid.sc is None or kind.scales is None:
        d, sc = halved(ideal), None
        step = d
    else:
        d = halved(by_blocks(grid.sc * along, kind) / by_blocks(grid.sc.square() * square, kind).clamp_min(TINY))
        sc = never_zero(in_units(ideal, d, kind.scales))
        step = d.repeat_interleave(kind.per_block, 1) * sc
    if grid.low is None:
        return BlockGrid.of(kind, d, None, sc)
    over = step * sums - weighed
    if grid.mn is None or kind.mins is None:
        return BlockGrid.of(kind, d, (-over / total).half().to(d.dtype), sc)
    dmin = halved(by_blocks(grid.mn * over, kind) / by_blocks(grid.mn.square() * total, kind).clamp_min(TINY)).abs()
    return BlockGrid.of(kind, d, dmin, sc, in_units(over / total, dmin, (0, kind.mins)))


def by_blocks(x: PerGroup, kind: BlockType) -> PerBlock:
    return x.unflatten(1, (-1, kind.per_block)).sum(2)


def error_of_blocks(grid: BlockGrid, q: Groups, X: Groups, w: Weighting) -> PerBlock:
    values = q.clone() if grid.zero is None else q - per_group(grid.zero)
    return by_blocks(values.mul_(per_group(grid.step)).sub_(X).square_().mul_(w).sum(1).T, grid.kind)


def polished(
    Q: Weight, W: Weight, hessian: Hessian, grid: BlockGrid, *, mask: Bool[Tensor, "m n"] | None = None, rounds: int
) -> tuple[Weight, BlockGrid]:
    """Return Q with better scales and codes, and the grid with these: rounds of coordinate descent on each in turn."""
    H, now = hessian.damped.to(W.dtype), in_order(Q, None)
    slope = H @ (in_order(W, None) - now)
    for _ in range(rounds):
        descent = ScaleDescent(now, slope, H, grid)
        now, grid = now + descent.run(), descent.grid()
        now = descended(now, slope, H, ColumnRounding(grid, mask, None, len(now), now.dtype))
    return now.T, grid


class ScaleDescent:
    """Move one scale or minimum of every row at a time to its best for the same codes, by E ||(W - Q) x||^2.

    Everything is transposed: parts (blocks or groups, m), Q and codes (n, m). slope: H (W - Q)^T, brought up to date
    in place; while a span of columns is worked on, within it alone. changes: of Q^T so far.
    """

    def __init__(self, Q: Tensor, slope: Tensor, H: Tensor, grid: BlockGrid) -> None:
        self.kind, self.H, self.slope = grid.kind, H, slope
        self.codes = grid._codes(Q.T).T.contiguous()
        self.changes = torch.zeros_like(self.slope)
        self.d, self.low, self.sc, self.mn = (none_or(Tensor.contiguous, none_or(Tensor.t, p)) for p in grid.parts)

    def grid(self) -> BlockGrid:
        parts = (self.d, self.low, self.sc, self.mn)
        return BlockGrid.of(self.kind, *(none_or(Tensor.contiguous, none_or(Tensor.t, part)) for part in parts))

    def run(self) -> Float[Tensor, "n m"]:
        """Return the change of Q^T."""
        n, size = len(self.codes), self.kind.block
        for start, stop in spans(0, n, max(SPAN // size, 1) * size):
            self.span = slice(start, stop)
            for first in range(start, stop, size):
                self.move_scales(first)
                self.move_minima(first)
            for others in (slice(0, start), slice(stop, n)):
                self.slope[others].addmm_(self.H[others, self.span], self.changes[self.span], alpha=-1)
        return self.changes

    def groups(self, first: int) -> list[tuple[int, slice]]:
        """The groups of the block whose first column is `first`: their numbers and columns."""
        size = self.kind.group
        return [(at // size, slice(at, at + size)) for at in range(first, first + self.kind.block, size)]

    def spread(self, part: Float[Tensor, "groups m"], first: int) -> Float[Tensor, "columns m"]:
        """A part of the groups of a block, for each of its columns."""
        start = first // self.kind.group
        return part[start : start + self.kind.per_block].repeat_interleave(self.kind.group, 0)

    def move_scales(self, first: int) -> None:
        block, b = slice(first, first + self.kind.block), first // self.kind.block
        codes = self.codes[block]
        if self.sc is None or self.kind.scales is None:
            self.d[b] = self.moved(block, codes, self.d[b], halved)
            return
        self.d[b] = self.moved(block, self.spread(self.sc, first) * codes, self.d[b], halved)
        for g, columns in self.groups(first):
            self.sc[g] = self.moved(columns, self.d[b] * self.codes[columns], self.sc[g], within(self.kind.scales))

    def move_minima(self, first: int) -> None:
        if self.low is None:
            return
        block, b = slice(first, first + self.kind.block), first // self.kind.block
        if self.mn is None or self.kind.mins is None:
            ones = torch.ones_like(self.codes[block])
            self.low[b] = self.moved(block, ones, self.low[b], lambda x: x.half().to(x.dtype))
            return
        self.low[b] = self.moved(block, -self.spread(self.mn, first), self.low[b], lambda x: halved(x.clamp_min(0)))
        for g, columns in self.groups(first):
            direction = -self.low[b].expand(self.kind.group, -1)
            self.mn[g] = self.moved(columns, direction, self.mn[g], lambda x: x.round().clamp(0, self.kind.mins))

    def moved(
        self, columns: slice, direction: Float[Tensor, "c m"], old: Float[Tensor, "m"], rounded: Rule
    ) -> Float[Tensor, "m"]:
        """The best coefficient of a direction in some columns in place of `old`, rounded to what can be stored."""
        gain = (direction * self.slope[columns]).sum(0)
        curvature = (direction * (self.H[columns, columns] @ direction)).sum(0)
        new = rounded(torch.where(curvature > 0, old + gain / curvature, old))
        change = direction * (new - old)
        self.slope[self.span].addmm_(self.H[self.span, columns], change, alpha=-1)
        self.changes[columns] += change
        return new


def within(limits: tuple[int, int]) -> Rule:
    return lambda x: never_zero(x.round().clamp(*limits))
