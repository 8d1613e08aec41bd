"""Allocate ranks under a budget.

Every linear has a ladder of what it may become: factors of every rank that makes it smaller, each with its price and
the error that it leaves, and dense, without an error. The budget is spent on all ladders together, by the survey's
spectra; `uniform` gives all linears the same share of their parameters instead.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from compress.architectures.architecture import ModelSpec
from compress.architectures.own import as_own
from compress.architectures.sizes import Size, header_bytes
from compress.calibration.linears import FactorShape, LinearShape
from compress.calibration.spectra import Spectrum
from compress.errors import UsageError
from compress.models.factors import tensor_names
from compress.numerics.allocation import Ladder, spend
from compress.planning.budget import Choice, Limit
from compress.recipe import Budget
from compress.stages._stage import RankStage

NOTHING = 1e-12  # of all energy: less is rounding, and no linear is kept dense for it
Ranks = dict[str, int]
Spread = Callable[[int], Ranks | None]  # ranks for so much of the price, None where it is too little


@dataclass(frozen=True)
class RankSpace:
    """
    stage: the one that leaves ranks open. spec: what the model is without its factors.
    """

    stage: RankStage
    spec: ModelSpec

    @property
    def linears(self) -> Sequence[LinearShape]:
        return self.spec.linears

    @property
    def targets(self) -> dict[LinearShape, list[int]]:
        """The linears that may be factorized, and the ranks that make them smaller, increasing."""
        ladders = {linear: self.stage.rank_ladder(linear) for linear in self.linears}
        return {linear: ladder for linear, ladder in ladders.items() if ladder}

    def factorized(self, ranks: Mapping[str, int]) -> ModelSpec:
        """The model in factors of these ranks, even where the stage multiplies them out."""
        factors = {
            linear.path: self.stage.factor_shape(linear, ranks[linear.path])
            for linear in self.linears
            if linear.path in ranks
        }
        return self._written(factors)

    def _written(self, factors: Mapping[str, FactorShape]) -> ModelSpec:
        architecture = as_own(self.spec.architecture)
        return replace(self.spec, architecture=architecture, factors=factors, undecided=frozenset())

    @property
    def uniform_parameters(self) -> int:
        """Parameters of the model at the stage's uniform ranks."""
        return self._written(self.stage.uniform_factors(self.linears)).size.parameters

    def choice(self, allocation: str, ranks: Ranks) -> Choice:
        """Make a choice of ranks, written in factors or multiplied out."""
        spec = self.factorized(ranks)
        forms = {path: factors.form for path, factors in spec.factors.items()}
        if not self.stage.writes_factors:
            spec = replace(self.spec, undecided=frozenset())
        return Choice({"allocation": allocation, "ranks": ranks, "forms": forms}, spec)


def check_budget(space: RankSpace, budget: Budget, dense: Size) -> None:
    """Raises UsageError where not even the lowest ranks fit, or where nothing has to be factorized."""
    limit = Limit.of(budget, dense)
    lowest = space.factorized({linear.path: ladder[0] for linear, ladder in space.targets.items()})
    if limit.allows(space.factorized({})):
        raise UsageError("The budget deletes nothing: the whole model fits under it. Allow less.")
    if not limit.allows(lowest):
        raise UsageError(
            f"The budget of {limit.most:,} cannot be kept: the least that low-rank factors can come to is "
            f"{limit.measure(lowest):,}. Allow more, or target more of the linears."
        )


def rank_choices(space: RankSpace, budget: Budget | None, dense: Size, spectra: Mapping[str, Spectrum]) -> list[Choice]:
    """Allocate ranks by each of the stage's criteria, under the budget or the size of its uniform ranks."""
    limit = Limit(space.uniform_parameters, in_bytes=False) if budget is None else Limit.of(budget, dense)
    return [
        space.choice(allocation, fitted(space, spread_by(space, allocation, spectra, in_bytes=limit.in_bytes), limit))
        for allocation in space.stage.allocations
    ]


def fitted(space: RankSpace, spread: Spread, limit: Limit) -> Ranks:
    """Find the ranks of the highest price that the limit allows."""
    # The rest of the model costs what it costs.
    dense = sum(dense_price(space, linear, limit.in_bytes) for linear in space.targets)
    ranks = spread(limit.most - (limit.measure(space.factorized({})) - dense))
    if ranks is None or not limit.allows(space.factorized(ranks)):
        raise UsageError(f"No ranks were found within the budget of {limit.most:,}. Allow more.")
    return ranks


def spread_by(space: RankSpace, allocation: str, spectra: Mapping[str, Spectrum], *, in_bytes: bool) -> Spread:
    """Return a function from a total price to ranks, for one criterion."""
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
    """Price of a linear's factors, in parameters or in bytes on disk."""
    factors = space.stage.factor_shape(linear, rank)
    bias = linear.m if linear.has_bias else 0  # what it has is no part of what is stored in place of its weight
    numbers = factors.stored(linear) + bias
    if not in_bytes:
        return numbers
    indices = 4 * linear.m if factors.form == "pivot" else 0
    names = tensor_names(factors.form, has_bias=factors.has_bias)
    return numbers * space.spec.dtype.itemsize + indices + headers(linear, names)


def dense_price(space: RankSpace, linear: LinearShape, in_bytes: bool) -> int:
    numbers = linear.m * linear.n + (linear.m if linear.has_bias else 0)
    names = ["weight", "bias"] if linear.has_bias else ["weight"]
    return numbers * space.spec.dtype.itemsize + headers(linear, names) if in_bytes else numbers


def headers(linear: LinearShape, names: Sequence[str]) -> int:
    return sum(header_bytes(f"{linear.path}.{name}") for name in names)


def uniform_ranks(
    targets: Mapping[LinearShape, Sequence[int]], prices: Mapping[LinearShape, Sequence[int]], total: int
) -> Ranks | None:
    """Give every linear the largest common share of its dense price."""

    def bought(share: float) -> dict[LinearShape, int]:
        """Rung on each linear's ladder, at least the cheapest."""
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
    """Error at each rank, in the criterion's measure."""
    values = spectrum.energy if allocation == "energy" or spectrum.felt is None else spectrum.felt
    total = float(values.sum())
    kept = torch.cat([values.new_zeros(1), values.cumsum(0)]).tolist()
    scale = {"energy": 1 / max(total, 1e-300), "mixed": max(total, 1e-300) ** -0.5, "fisher": 1.0}[allocation]
    lost = (total - kept[min(rank, len(values))] for rank in ranks)
    return [energy * scale if energy > NOTHING * total else 0.0 for energy in lost]
