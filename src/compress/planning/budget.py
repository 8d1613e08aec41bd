"""Find the widths that fit under a budget: the Pareto-largest combinations."""

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.architectures.architecture import ModelSpec
from compress.architectures.sizes import Size
from compress.errors import Problems, UsageError, report
from compress.recipe import Budget
from compress.stages._stage import StageConfig

Counts = Mapping[str, Any]


def plan_stages(stages: Sequence[StageConfig], spec: ModelSpec) -> tuple[tuple[StageConfig, ...], ModelSpec]:
    """Apply stages to a model's sizes, one after another.

    Raises UsageError with what does not fit, a line for each problem of all stages.
    """
    problems, planned = Problems(), list[StageConfig]()
    for stage in stages:
        with problems.collect():
            settled, spec = stage.plan(spec)
            planned.append(settled)
    problems.report()
    return tuple(planned), spec


@dataclass(frozen=True)
class Choice:
    """
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
        return {kind: count for kind, count in self.counts.items() if kind not in ("ranks", "forms")}


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

    @property
    def unit(self) -> str:
        return "bytes" if self.in_bytes else "parameters"

    def measure(self, spec: ModelSpec) -> int:
        return spec.disk_bytes if self.in_bytes else spec.size.parameters

    def allows(self, spec: ModelSpec) -> bool:
        return self.measure(spec) <= self.most


@dataclass(frozen=True)
class WidthSpace:
    """The widths that stages left open, applied to the dense model `base`."""

    stages: Sequence[StageConfig]
    base: ModelSpec

    def spec(self, counts: Counts) -> ModelSpec:
        _, spec = plan_stages([stage.decided(counts) for stage in self.stages], self.base)
        if not spec.is_decided:
            raise UsageError("A budget needs widths that are known beforehand: leave out explained_variance.")
        return spec

    @property
    def ladders(self) -> dict[str, list[int]]:
        """The counts of each open kind, increasing."""
        dense = {"hidden": self.base.dense_width, **self.base.dense_units}
        steps = {kind: stage.step for stage in self.stages if (kind := stage.opens)}
        # Neurons come last: they are the finest, so that they can fill a budget up.
        kinds = [kind for kind in ("kv_groups", "hidden", "neurons") if kind in steps]
        return {kind: sorted({*range(steps[kind], dense[kind] + 1, steps[kind]), dense[kind]}) for kind in kinds}


def width_choices(space: WidthSpace, budget: Budget, dense: Size) -> list[Choice]:
    """List the shapes under the budget by increasing hidden size, each with as many neurons and groups as fit.

    Raises UsageError where not even the smallest fits, or the whole model does.
    """
    limit = Limit.of(budget, dense)
    fitting = [Choice(counts, spec) for counts, spec in largest_fitting(space, limit)]
    if not fitting:
        report(why_nothing_fits(space, limit))
    if fitting[0].spec.deletes_nothing:
        raise UsageError("The budget deletes nothing: the whole model fits under it. Allow less.")
    return sorted(fitting, key=lambda choice: sorted(choice.counts.items()))


def why_nothing_fits(space: WidthSpace, limit: Limit) -> list[str]:
    """Say what the smallest legal shape comes to; where there is none, why."""
    specs = [space.spec(counts) for counts in combinations([*space.ladders.items()])]
    smallest = next((spec for spec in reversed(specs) if not spec.problems()), None)
    if smallest is None:
        return specs[0].problems()
    return [
        f"The budget of {limit.most:,} {limit.unit} cannot be kept: the least this recipe can come to is "
        f"{limit.measure(smallest):,}. Allow more."
    ]


def largest_fitting(space: WidthSpace, limit: Limit) -> Iterator[tuple[dict[str, int], ModelSpec]]:
    """For all counts of the other open kinds, find the largest of the last one that fits; skip dominated ones."""
    *outer, (kind, ladder) = space.ladders.items()
    found: list[dict[str, int]] = []

    def is_contained(counts: Mapping[str, int]) -> bool:
        return any(all(other[name] >= count for name, count in counts.items()) for other in found)

    # Downwards, so that what contains another comes before it, and the many small ones are never measured.
    for counts in combinations(outer):
        if is_contained({**counts, kind: ladder[-1]}):
            continue
        specs = [(count, space.spec({**counts, kind: count})) for count in ladder]
        legal = [(count, spec) for count, spec in specs if not spec.problems()]
        number = bisect_right(legal, False, key=lambda rung: not limit.allows(rung[1]))
        if number and not is_contained(largest := {**counts, kind: legal[number - 1][0]}):
            found.append(largest)
            yield largest, legal[number - 1][1]


def combinations(ladders: Sequence[tuple[str, list[int]]]) -> Iterator[dict[str, int]]:
    """Yield all combinations of counts, the largest first."""
    names = [kind for kind, _ in ladders]
    for values in itertools.product(*(ladder[::-1] for _, ladder in ladders)):
        yield dict(zip(names, values, strict=True))
