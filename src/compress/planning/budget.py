"""Find what fits under a budget: the Pareto-largest combinations of widths, or ranks.

Every linear has a ladder of what it may become: factors of every rank that makes it smaller, each with its price and
the error that it leaves, and dense, without an error. The budget is spent on all ladders together, by the survey's
spectra; `uniform` gives all linears the same share of their parameters instead.
"""

import functools
import itertools
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from compress.architectures.architecture import ModelSpec, Size, header_bytes
from compress.architectures.own import as_own
from compress.calibration.linears import FactorShape, LinearShape
from compress.calibration.observers import Spectrum
from compress.errors import Problems, UsageError, report
from compress.models.factors import tensor_names
from compress.numerics.allocation import Ladder, spend
from compress.recipe import Budget
from compress.stages._stage import StageConfig
from compress.stages.factorize import Factorize

Counts = Mapping[str, Any]
Ranks = dict[str, int]
NOTHING = 1e-12  # of all energy: less is rounding, and no linear is kept dense for it
UNTOLD = ("ranks", "forms", "dropped", "types", "tables")  # counts that are a number for each matrix or block
DELETES_NOTHING = "The budget deletes nothing: the whole model fits under it. Allow less."


def plan_stages(stages: Sequence[StageConfig], spec: ModelSpec) -> tuple[tuple[StageConfig, ...], ModelSpec]:
    """Apply stages to a model's sizes, in turn. Raises UsageError with all that does not fit, a line a problem."""
    problems, planned = Problems(), list[StageConfig]()
    for stage in stages:
        with problems.collect():
            settled, spec = stage.plan(spec)
            planned.append(settled)
    problems.report()
    return tuple(planned), spec


@dataclass(frozen=True)
class Choice:
    """A shape, or an allocation of ranks, that a budget allows.

    counts: what stages left open: widths by kind, or the `allocation`, its `ranks` and their `forms`.
    spec: what they make of the model.
    """

    counts: Counts
    spec: ModelSpec

    @property
    def size(self) -> Size:
        return self.spec.size

    @property
    def label(self) -> Counts:
        """The counts that distinguish it from other choices."""
        return {kind: count for kind, count in self.counts.items() if kind not in UNTOLD}


@dataclass(frozen=True)
class Limit:
    """The limit on the whole model, in parameters or in bytes on disk."""

    most: int
    in_bytes: bool

    @classmethod
    def of(cls, budget: Budget, dense: Size) -> "Limit":
        if budget.target_size is not None:
            return cls(budget.target_size, in_bytes=True)
        return cls(int((budget.keep_params or 0) * dense.parameters), in_bytes=False)

    def measure(self, spec: ModelSpec) -> int:
        return spec.disk_bytes if self.in_bytes else spec.size.parameters

    def allows(self, spec: ModelSpec) -> bool:
        return self.measure(spec) <= self.most


@dataclass(frozen=True)
class WidthSpace:
    """The widths that stages left open, applied to the dense model.

    base: as a result whose stream changes is written. whole: as one that keeps all of the stream is, its norms and a
    tied head with it; None where there is no such result.
    """

    stages: Sequence[StageConfig]
    base: ModelSpec
    whole: ModelSpec | None = None

    def decided(self, counts: Counts) -> "WidthSpace":
        """The stages for these counts; where all of the stream is kept those that change it are left out."""
        if self.whole is None or counts.get("hidden") != self.base.dense_width:
            return WidthSpace([stage.decided(counts) for stage in self.stages], self.base)
        stages = [stage for stage in self.stages if not stage.changes_stream]
        return WidthSpace([stage.decided(counts) for stage in stages], self.whole)

    def spec(self, counts: Counts) -> ModelSpec:
        decided = self.decided(counts)
        _, spec = plan_stages(decided.stages, decided.base)
        if not spec.is_decided:
            raise UsageError("A budget needs widths that are known beforehand: leave out explained_variance.")
        return spec

    @property
    def ladders(self) -> dict[str, list[int]]:
        """The counts of each open kind, increasing."""
        dense = {"blocks": self.base.num_blocks, "hidden": self.base.dense_width, **self.base.dense_units}
        steps = {kind: stage.step for stage in self.stages if (kind := stage.opens)}
        # Neurons come last: they are the finest, so that they can fill a budget up.
        kinds = [kind for kind in ("blocks", "kv_groups", "hidden", "neurons") if kind in steps]
        return {kind: sorted({*range(steps[kind], dense[kind] + 1, steps[kind]), dense[kind]}) for kind in kinds}


def width_choices(space: WidthSpace, budget: Budget, dense: Size) -> list[Choice]:
    """List the shapes under the budget by increasing hidden size, each with as many neurons and groups as fit.

    Raises UsageError where not even the smallest fits, or the whole model does.
    """
    limit = Limit.of(budget, dense)
    fitting = [Choice(counts, spec) for counts, spec in largest_fitting(space, limit)]
    if not fitting:
        specs = [space.spec(counts) for counts in combinations([*space.ladders.items()])]
        smallest = next((spec for spec in reversed(specs) if not spec.problems()), None)
        if smallest is None:
            report(specs[0].problems())
        else:
            raise UsageError(
                f"The budget of {limit.most:,} {'bytes' if limit.in_bytes else 'parameters'} cannot be kept: the least "
                f"this recipe can come to is {limit.measure(smallest):,}. Allow more."
            )
    if fitting[0].spec.deletes_nothing and fitting[0].spec.num_blocks == space.base.num_blocks:
        raise UsageError(DELETES_NOTHING)
    # Each block that may go is measured, which is slow: half of what depth alone could pay with is looked at.
    least = (space.base.num_blocks + min(choice.spec.num_blocks for choice in fitting)) // 2
    deep = [choice for choice in fitting if choice.spec.num_blocks >= least] or fitting
    return sorted(deep, key=lambda choice: sorted(choice.counts.items()))


def largest_fitting(space: WidthSpace, limit: Limit) -> Iterator[tuple[dict[str, int], ModelSpec]]:
    """For all counts of the other open kinds, find the largest of the last one that fits; skip dominated ones."""
    *outer, (kind, ladder) = space.ladders.items()
    found: list[dict[str, int]] = []

    def is_contained(counts: Mapping[str, int]) -> bool:
        return any(all(other[name] >= count for name, count in counts.items()) for other in found)

    def legal(counts: Mapping[str, int], most: int) -> tuple[dict[str, int], ModelSpec] | None:
        """The last rung up to `most` that the architecture has room for."""
        told = ({**counts, kind: ladder[rung]} for rung in range(most, -1, -1))
        return next(((each, spec) for each in told if not (spec := space.spec(each)).problems()), None)

    def is_too_large(counts: Mapping[str, int], rung: int) -> bool:
        best = legal(counts, rung)
        return best is not None and not limit.allows(best[1])

    # Downwards, so that what contains another comes before it, and the many small ones are never measured.
    for counts in combinations(outer):
        if is_contained({**counts, kind: ladder[-1]}):
            continue
        number = bisect_right(range(len(ladder)), False, key=functools.partial(is_too_large, counts))
        best = legal(counts, number - 1)
        if best is not None and not is_contained(best[0]):
            found.append(best[0])
            yield best


def combinations(ladders: Sequence[tuple[str, list[int]]]) -> Iterator[dict[str, int]]:
    names = [kind for kind, _ in ladders]
    for values in itertools.product(*(ladder[::-1] for _, ladder in ladders)):
        yield dict(zip(names, values, strict=True))


@dataclass(frozen=True)
class RankSpace:
    """Ranks left open. stage: the one that leaves them open. spec: what the model is without its factors."""

    stage: Factorize
    spec: ModelSpec

    @property
    def targets(self) -> dict[LinearShape, list[int]]:
        """The linears that may be factorized, and the ranks that make them smaller, increasing."""
        ladders = {linear: self.stage.rank_ladder(linear) for linear in self.spec.linears}
        return {linear: ladder for linear, ladder in ladders.items() if ladder}

    def factorized(self, ranks: Mapping[str, int]) -> ModelSpec:
        """The model in factors of these ranks, even where the stage multiplies them out."""
        found = [linear for linear in self.spec.linears if linear.path in ranks]
        return self.written({linear.path: self.stage.factor_shape(linear, ranks[linear.path]) for linear in found})

    def written(self, factors: Mapping[str, FactorShape]) -> ModelSpec:
        architecture = as_own(self.spec.architecture)
        return replace(self.spec, architecture=architecture, factors=factors, undecided=frozenset())

    def check(self, limit: Limit) -> None:
        """Raises UsageError where not even the lowest ranks fit, or where nothing has to be factorized."""
        lowest = self.factorized({linear.path: ladder[0] for linear, ladder in self.targets.items()})
        if limit.allows(self.factorized({})):
            raise UsageError(DELETES_NOTHING)
        if not limit.allows(lowest):
            raise UsageError(
                f"The budget of {limit.most:,} cannot be kept: the least that low-rank factors can come to is "
                f"{limit.measure(lowest):,}. Allow more, or target more of the linears."
            )

    def choice(self, allocation: str, ranks: Ranks) -> Choice:
        """Make a choice of ranks, written in factors or multiplied out."""
        spec = self.factorized(ranks)
        forms = {path: factors.form for path, factors in spec.factors.items()}
        if not self.stage.writes_factors:
            spec = replace(self.spec, undecided=frozenset())
        return Choice({"allocation": allocation, "ranks": ranks, "forms": forms}, spec)

    def price(self, linear: LinearShape, rank: int | None, *, in_bytes: bool) -> int:
        """Price of a linear in factors of a rank, or dense, in parameters or in bytes on disk."""
        numbers, indices = linear.m if linear.has_bias else 0, 0
        if rank is None:
            numbers += linear.m * linear.n
            names = ["weight", "bias"] if linear.has_bias else ["weight"]
        else:
            factors = self.stage.factor_shape(linear, rank)
            numbers += factors.stored(linear)
            indices = 4 * linear.m if factors.form == "pivot" else 0
            names = tensor_names(factors.form, has_bias=factors.has_bias)
        headers = sum(header_bytes(f"{linear.path}.{name}") for name in names)
        return numbers * self.spec.dtype.itemsize + indices + headers if in_bytes else numbers


def rank_choices(space: RankSpace, budget: Budget | None, dense: Size, spectra: Mapping[str, Spectrum]) -> list[Choice]:
    """Allocate ranks by each of the stage's criteria, under the budget or the size of its uniform ranks."""
    if budget is None:
        uniform = space.written(space.stage.uniform_factors(space.spec.linears))
        limit = Limit(uniform.size.parameters, in_bytes=False)
    else:
        limit = Limit.of(budget, dense)
    return [space.choice(each, allocated(space, each, spectra, limit)) for each in space.stage.allocations]


def allocated(space: RankSpace, allocation: str, spectra: Mapping[str, Spectrum], limit: Limit) -> Ranks:
    """Find the ranks of the highest price that the limit allows, by one criterion."""
    targets = {linear.path: ladder for linear, ladder in space.targets.items()}
    prices = {
        linear.path: [space.price(linear, rank, in_bytes=limit.in_bytes) for rank in (*ladder, None)]
        for linear, ladder in space.targets.items()
    }
    # The rest of the model costs what it costs.
    total = limit.most - (limit.measure(space.factorized({})) - sum(costs[-1] for costs in prices.values()))
    if allocation == "uniform":
        places = uniform_places(prices, total)
    else:
        lost = {path: [*errors(spectra[path], allocation, ranks), 0.0] for path, ranks in targets.items()}
        places = spend({path: Ladder(costs, lost[path]) for path, costs in prices.items()}, total)
    found = {path: (*targets[path], None)[place] for path, place in (places or {}).items()}
    ranks = {path: rank for path, rank in found.items() if rank is not None}
    if places is None or not limit.allows(space.factorized(ranks)):
        raise UsageError(f"No ranks were found within the budget of {limit.most:,}. Allow more.")
    return ranks


def uniform_places(prices: Mapping[str, Sequence[int]], total: int) -> dict[str, int] | None:
    """Give every linear the largest common share of its dense price: a rung on each ladder, at least the cheapest."""

    def bought(share: float) -> dict[str, int] | None:
        """What the share buys, where that is within the total."""
        places = {path: max(0, sum(cost <= share * costs[-1] for cost in costs) - 1) for path, costs in prices.items()}
        return places if sum(prices[path][place] for path, place in places.items()) <= total else None

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if bought(middle) else (low, middle)
    return bought(1.0) or bought(low)


def errors(spectrum: Spectrum, allocation: str, ranks: Sequence[int]) -> list[float]:
    """Error at each rank, in the criterion's measure."""
    values = spectrum.energy if allocation == "energy" or spectrum.felt is None else spectrum.felt
    total = float(values.sum())
    kept = torch.cat([values.new_zeros(1), values.cumsum(0)]).tolist()
    scale = {"energy": 1 / max(total, 1e-300), "mixed": max(total, 1e-300) ** -0.5, "fisher": 1.0}[allocation]
    lost = (total - kept[min(rank, len(values))] for rank in ranks)
    return [energy * scale if energy > NOTHING * total else 0.0 for energy in lost]
