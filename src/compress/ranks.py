"""Ranks under a budget: how much of it each linear gets.

Every linear has a ladder of what it may become: factors of every rank that makes it smaller, each with its price and
the error that it leaves, and dense, without an error. The budget is spent on all ladders together, by the survey's
spectra; `uniform` gives all linears the same share of their parameters instead.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from compress.budget import Choice
from compress.checkpoints.lowrank import LowRankTarget
from compress.checkpoints.sizes import HEADER_BYTES_PER_TENSOR, Size, disk_bytes, size_of
from compress.checkpoints.targets import Shape, Target
from compress.errors import UsageError
from compress.numerics.allocation import Ladder, spend
from compress.recipe import Budget
from compress.stages._stage import StageConfig
from compress.streaming.linears import LinearShape
from compress.streaming.spectra import Spectrum

Ranks = dict[str, int]
Spread = Callable[[int], Ranks | None]  # ranks for so much of the price, None where it is too little


@dataclass(frozen=True)
class RankSpace:
    """
    stage: the one that leaves ranks open. base, shape: what the model would be without factors. linears: its linears.
    """

    stage: StageConfig
    linears: Sequence[LinearShape]
    base: Target
    shape: Shape
    dtype: torch.dtype

    @property
    def targets(self) -> dict[LinearShape, list[int]]:
        """The linears that may be factorised, and the ranks that make them smaller, increasing."""
        ladders = {linear: self.stage.rank_ladder(linear) for linear in self.linears}
        return {linear: ladder for linear, ladder in ladders.items() if ladder}

    def shaped(self, ranks: Mapping[str, int]) -> Shape:
        factors = self.stage.fitted({"ranks": ranks}).planned_factors(self.linears)
        return replace(self.shape, factors=factors)

    def model(self, ranks: Mapping[str, int]) -> PreTrainedModel:
        """The model in factors, without weights."""
        return LowRankTarget(self.base).model(self.shaped(ranks))

    def choice(self, allocation: str, ranks: Ranks) -> Choice:
        """As it is written: in factors, or multiplied out."""
        in_factors = self.stage.writes_factors
        model = self.model(ranks) if in_factors else self.base.model(self.shape)
        shape = self.shaped(ranks) if in_factors else self.shape
        return Choice({"allocation": allocation, "ranks": ranks}, shape, size_of(model, self.dtype))


def rank_choices(space: RankSpace, budget: Budget | None, dense: Size, spectra: Mapping[str, Spectrum]) -> list[Choice]:
    """What each of the stage's allocations makes of the budget; without one, of what its uniform ranks would take.

    Raises UsageError where not even the lowest ranks fit.
    """
    in_bytes = budget is not None and budget.target_size is not None

    def measure(ranks: Mapping[str, int]) -> int:
        model = space.model(ranks)
        return disk_bytes(model, space.dtype) if in_bytes else size_of(model, space.dtype).parameters

    if budget is None:
        limit = measure({path: f.rank for path, f in space.stage.uniform.planned_factors(space.linears).items()})
    else:
        limit = budget.target_size or int((budget.keep_params or 0) * dense.parameters)
    found = []
    for allocation in space.stage.allocations:
        ranks = fitted(spread_by(space, allocation, spectra, in_bytes=in_bytes), measure, limit)
        if not ranks:
            raise UsageError("The budget deletes nothing: the whole model fits under it. Allow less.")
        found.append(space.choice(allocation, ranks))
    return found


def fitted(spread: Spread, measure: Callable[[Mapping[str, int]], int], limit: int) -> Ranks:
    """The ranks of the highest price that the whole model's measure allows.

    Prices count linears alone, and headers of files roughly; the measure of the finished shape decides.
    """
    price = limit
    while (ranks := spread(price)) is not None:
        if (excess := measure(ranks) - limit) <= 0:
            return ranks
        price -= excess
    raise UsageError(
        f"The budget of {limit:,} cannot be kept: the least that low-rank factors can come to is "
        f"{measure(lowest_ranks(spread)):,}. Allow more, or target more of the linears."
    )


def lowest_ranks(spread: Spread) -> Ranks:
    """The ranks of the least price."""
    price = 1
    while spread(price) is None:
        price *= 2
    low = price // 2
    while price - low > 1:
        middle = (low + price) // 2
        low, price = (low, middle) if spread(middle) is not None else (middle, price)
    return spread(price) or {}


def spread_by(space: RankSpace, allocation: str, spectra: Mapping[str, Spectrum], *, in_bytes: bool) -> Spread:
    """How an allocation spends a price on the linears."""
    prices = {
        linear: [
            *(price(space, linear, rank, in_bytes=in_bytes) for rank in ladder),
            dense_price(space, linear, in_bytes),
        ]
        for linear, ladder in space.targets.items()
    }
    if allocation == "uniform":
        return lambda total: uniform_ranks(space.targets, prices, total)
    ladders = {
        linear.path: Ladder(prices[linear], [*errors(spectra[linear.path], allocation, ranks), 0.0])
        for linear, ranks in space.targets.items()
    }
    ranks_of = {linear.path: ranks for linear, ranks in space.targets.items()}

    def ranks_for(total: int) -> Ranks | None:
        places = spend(ladders, total)
        if places is None:
            return None
        return {path: ranks_of[path][place] for path, place in places.items() if place < len(ranks_of[path])}

    return ranks_for


def price(space: RankSpace, linear: LinearShape, rank: int, *, in_bytes: bool) -> int:
    factors = space.stage.factor_shape(linear, rank)
    numbers = factors.stored(linear)
    if not in_bytes:
        return numbers
    indices = 4 * linear.m if factors.form == "pivot" else 0
    return numbers * space.dtype.itemsize + indices + 4 * HEADER_BYTES_PER_TENSOR


def dense_price(space: RankSpace, linear: LinearShape, in_bytes: bool) -> int:
    return linear.m * linear.n * (space.dtype.itemsize if in_bytes else 1)


def uniform_ranks(
    targets: Mapping[LinearShape, Sequence[int]], prices: Mapping[LinearShape, Sequence[int]], total: int
) -> Ranks | None:
    """The largest share of its dense price that every linear may have; its rank is what it buys."""

    def bought(share: float) -> dict[LinearShape, int]:
        """The place on each linear's ladder; the cheapest is never left out."""
        return {
            linear: max(0, sum(cost <= share * costs[-1] for cost in costs) - 1) for linear, costs in prices.items()
        }

    def cost(share: float) -> int:
        return sum(prices[linear][place] for linear, place in bought(share).items())

    if cost(0.0) > total:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= total else (low, middle)
    places = bought(1.0 if cost(1.0) <= total else low)
    return {linear.path: targets[linear][p] for linear, p in places.items() if p < len(targets[linear])}


def errors(spectrum: Spectrum, allocation: str, ranks: Sequence[int]) -> list[float]:
    """What is lost at each rank, in the allocation's measure."""
    values = spectrum.energy if allocation == "energy" or spectrum.felt is None else spectrum.felt
    total = float(values.sum())
    kept = torch.cat([values.new_zeros(1), values.cumsum(0)]).tolist()
    scale = {"energy": 1 / max(total, 1e-300), "mixed": max(total, 1e-300) ** -0.5, "fisher": 1.0}[allocation]
    return [max(0.0, total - kept[min(rank, len(values))]) * scale for rank in ranks]
