"""Ranks under a budget: how much of it each linear gets.

Every linear has a ladder of what it may become: factors of every rank that makes it smaller, each with its price and
the error that it leaves, and dense, without an error. The budget is spent on all ladders together, by the survey's
spectra; `uniform` gives all linears the same share of their parameters instead.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from compress.architectures.architecture import Architecture, Shape
from compress.architectures.own import as_own
from compress.budget import Choice
from compress.checkpoints.sizes import Size, disk_bytes, header_bytes, size_of
from compress.errors import UsageError
from compress.models.factors import tensor_names
from compress.numerics.allocation import Ladder, spend
from compress.recipe import Budget
from compress.stages._stage import FactorisingStage
from compress.streaming.linears import LinearShape
from compress.streaming.spectra import Spectrum

NOTHING = 1e-12  # of all energy: less is rounding, and no linear is kept dense for it
Ranks = dict[str, int]
Spread = Callable[[int], Ranks | None]  # ranks for so much of the price, None where it is too little


@dataclass(frozen=True)
class RankSpace:
    """
    stage: the one that leaves ranks open. base, shape: what the model would be without factors. linears: its linears.
    """

    stage: FactorisingStage
    linears: Sequence[LinearShape]
    base: Architecture
    shape: Shape
    dtype: torch.dtype

    @property
    def targets(self) -> dict[LinearShape, list[int]]:
        """The linears that may be factorised, and the ranks that make them smaller, increasing."""
        ladders = {linear: self.stage.rank_ladder(linear) for linear in self.linears}
        return {linear: ladder for linear, ladder in ladders.items() if ladder}

    def shaped(self, ranks: Mapping[str, int]) -> Shape:
        stage = self.stage.fitted({"ranks": ranks})
        assert isinstance(stage, FactorisingStage)
        return replace(self.shape, factors=stage.planned_factors(self.linears))

    def model(self, ranks: Mapping[str, int]) -> PreTrainedModel:
        """The model in factors, without weights."""
        return as_own(self.base).model(self.shaped(ranks))

    def choice(self, allocation: str, ranks: Ranks) -> Choice:
        """As it is written: in factors, or multiplied out."""
        in_factors = self.stage.writes_factors
        model = self.model(ranks) if in_factors else self.base.model(self.shape)
        shape = self.shaped(ranks)
        forms = {path: factors.form for path, factors in shape.factors.items()}
        counts = {"allocation": allocation, "ranks": ranks, "forms": forms}
        return Choice(counts, shape if in_factors else self.shape, size_of(model, self.dtype))


def check_budget(space: RankSpace, budget: Budget, dense: Size) -> None:
    """Raises UsageError where not even the lowest ranks fit, or where nothing has to be factorised."""
    limit = Limit.of(space, budget, dense)
    lowest = {linear.path: ladder[0] for linear, ladder in space.targets.items()}
    if limit.measure({}) <= limit.most:
        raise UsageError("The budget deletes nothing: the whole model fits under it. Allow less.")
    if (least := limit.measure(lowest)) > limit.most:
        raise UsageError(
            f"The budget of {limit.most:,} cannot be kept: the least that low-rank factors can come to is {least:,}. "
            "Allow more, or target more of the linears."
        )


def rank_choices(space: RankSpace, budget: Budget | None, dense: Size, spectra: Mapping[str, Spectrum]) -> list[Choice]:
    """What each of the stage's allocations makes of the budget; without one, of what its uniform ranks would take."""
    limit = Limit.of(space, budget, dense)
    return [
        space.choice(allocation, fitted(spread_by(space, allocation, spectra, in_bytes=limit.in_bytes), limit))
        for allocation in space.stage.allocations
    ]


@dataclass(frozen=True)
class Limit:
    """What the whole model may come to, in parameters or in bytes on disk."""

    space: RankSpace
    most: int
    in_bytes: bool

    @classmethod
    def of(cls, space: RankSpace, budget: Budget | None, dense: Size) -> "Limit":
        if budget is None:
            uniform = space.stage.uniform.planned_factors(space.linears)
            ranks = {path: factors.rank for path, factors in uniform.items()}
            return cls(space, size_of(space.model(ranks), space.dtype).parameters, in_bytes=False)
        if budget.target_size is not None:
            return cls(space, budget.target_size, in_bytes=True)
        return cls(space, int((budget.keep_params or 0) * dense.parameters), in_bytes=False)

    @property
    def for_linears(self) -> int:
        """What of it is left for those that may be factorised: the rest of the model costs what it costs."""
        linears = sum(dense_price(self.space, linear, self.in_bytes) for linear in self.space.targets)
        return self.most - (self.measure({}) - linears)

    def measure(self, ranks: Mapping[str, int]) -> int:
        model = self.space.model(ranks)
        return disk_bytes(model, self.space.dtype) if self.in_bytes else size_of(model, self.space.dtype).parameters


def fitted(spread: Spread, limit: Limit) -> Ranks:
    """The ranks of the highest price that the whole model's measure allows."""
    ranks = spread(limit.for_linears)
    if ranks is None or limit.measure(ranks) > limit.most:
        raise UsageError(f"No ranks were found within the budget of {limit.most:,}. Allow more.")
    return ranks


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
    """Of a linear's factors, in parameters or in bytes on disk."""
    factors = space.stage.factor_shape(linear, rank)
    bias = linear.m if linear.has_bias else 0  # what it has is no part of what is stored in place of its weight
    numbers = factors.stored(linear) + bias
    if not in_bytes:
        return numbers
    indices = 4 * linear.m if factors.form == "pivot" else 0
    names = tensor_names(factors.form, has_bias=factors.has_bias)
    return numbers * space.dtype.itemsize + indices + headers(linear, names)


def dense_price(space: RankSpace, linear: LinearShape, in_bytes: bool) -> int:
    numbers = linear.m * linear.n + (linear.m if linear.has_bias else 0)
    names = ["weight", "bias"] if linear.has_bias else ["weight"]
    return numbers * space.dtype.itemsize + headers(linear, names) if in_bytes else numbers


def headers(linear: LinearShape, names: Sequence[str]) -> int:
    return sum(header_bytes(f"{linear.path}.{name}") for name in names)


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
    lost = (total - kept[min(rank, len(values))] for rank in ranks)
    return [energy * scale if energy > NOTHING * total else 0.0 for energy in lost]
