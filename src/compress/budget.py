"""What a budget leaves to choose: the shapes that fit under it and that no other fitting one contains."""

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from compress.architectures.architecture import Architecture, Shape
from compress.checkpoints.sizes import Size, by_depth, disk_bytes, size_of
from compress.errors import UsageError
from compress.recipe import Budget
from compress.stages._stage import StageConfig
from compress.streaming.sites import Count, StreamPoint

Counts = Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """
    counts: what stages left open: widths by kind, or the `allocation`, its `ranks` and their `forms`.
    shape: of the whole model.
    """

    counts: Counts
    shape: Shape
    size: Size

    @property
    def label(self) -> Counts:
        """What tells it from the others."""
        return {kind: count for kind, count in self.counts.items() if kind not in ("ranks", "forms")}


def planned_shape(
    stages: Sequence[StageConfig], points: Sequence[StreamPoint], units: Mapping[str, int]
) -> tuple[list[int | None], dict[str, Count]]:
    """Each point's width and each kind's count after all stages: the least that one plans; None: the data decides."""
    widths: list[int | None] = []
    for point in points:
        planned = [stage.planned_width(point) for stage in stages]
        known = [width for width in planned if width is not None]
        widths.append(min(known) if len(known) == len(planned) else None)
    return widths, {kind: planned_units(stages, kind, count) for kind, count in units.items()}


def planned_units(stages: Sequence[StageConfig], kind: str, count: int) -> Count:
    """How many of a kind stay after all stages: the least that one plans, or what one plans block by block."""
    planned = [stage.planned_units(kind, count) for stage in stages]
    apart = [counts for counts in planned if isinstance(counts, tuple)]
    return apart[-1] if apart else min(counts for counts in planned if isinstance(counts, int))


@dataclass(frozen=True)
class Space:
    """Everything that decides what a choice comes to.

    units: how many of each kind the dense blocks have.
    """

    stages: Sequence[StageConfig]
    points: Sequence[StreamPoint]
    units: Mapping[str, int]
    target: Architecture
    dtype: torch.dtype

    def shape(self, counts: Counts) -> Shape:
        stages = [stage.fitted(counts) for stage in self.stages]
        widths, units = planned_shape(stages, self.points, self.units)
        known = [width for width in widths if width is not None]
        if len(known) < len(widths):
            raise UsageError("A budget needs widths that are known beforehand: leave out explained_variance.")
        return Shape(tuple(known), units)

    def size(self, shape: Shape) -> Size:
        parameters = self._count(shape, lambda model: size_of(model, self.dtype).parameters)
        return Size(parameters, parameters * self.dtype.itemsize)

    def disk_bytes(self, shape: Shape) -> int:
        return self._count(shape, lambda model: disk_bytes(model, self.dtype))

    def _count(self, shape: Shape, measure: Callable[[PreTrainedModel], int]) -> int:
        apart = any(isinstance(count, tuple) for count in shape.units.values())
        if apart or len(set(shape.widths[:-1])) > 1:  # blocks that are not alike
            return measure(self.target.model(shape))
        blocks = self.points[0].num_blocks
        return by_depth(lambda depth: self.target.model(shape, num_blocks=depth), blocks, measure)


def choices(space: Space, budget: Budget, dense: Size) -> list[Choice]:
    """The shapes under the budget, by increasing hidden size: for each, as many neurons and groups as fit.

    Raises UsageError where not even the smallest fits.
    """
    limit = budget.target_size or int((budget.keep_params or 0) * dense.parameters)
    measure = space.disk_bytes if budget.target_size else lambda shape: space.size(shape).parameters
    fitting = [
        Choice(counts, shape, space.size(shape))
        for counts, shape in largest_fitting(space, lambda counts: measure(space.shape(counts)) <= limit)
    ]
    if not fitting:
        raise UsageError(why_nothing_fits(space, limit, measure, "bytes" if budget.target_size else "parameters"))
    return sorted(fitting, key=lambda choice: sorted(choice.counts.items()))


def why_nothing_fits(space: Space, limit: int, measure: Callable[[Shape], int], unit: str) -> str:
    """What the least legal shape comes to; where there is none, what is wrong with all."""
    shapes = [space.shape(counts) for counts in combinations([*ladders(space).items()])]
    smallest = next((shape for shape in reversed(shapes) if not space.target.faults(shape)), None)
    if smallest is None:
        return "\n".join(space.target.faults(shapes[0]))
    return (
        f"The budget of {limit:,} {unit} cannot be kept: the least this recipe can come to is "
        f"{measure(smallest):,}. Allow more."
    )


def ladders(space: Space) -> dict[str, list[int]]:
    """The legal counts of each open kind, increasing."""
    dense = {"hidden": space.points[0].dense_width, **space.units}
    steps = {kind: stage.step for stage in space.stages if (kind := stage.opens)}
    # Neurons come last: they are the finest, so that they can fill a budget up.
    kinds = [kind for kind in ("kv_groups", "hidden", "neurons") if kind in steps]
    return {kind: sorted({*range(steps[kind], dense[kind] + 1, steps[kind]), dense[kind]}) for kind in kinds}


def largest_fitting(space: Space, fits: Callable[[Mapping[str, int]], bool]) -> Iterator[tuple[dict[str, int], Shape]]:
    """For all counts of the other open kinds, the largest of the last one that fits; none that another contains."""
    *outer, (kind, ladder) = ladders(space).items()
    found: list[dict[str, int]] = []

    def is_contained(counts: Mapping[str, int]) -> bool:
        return any(all(other[name] >= count for name, count in counts.items()) for other in found)

    # Downwards, so that what contains another comes before it, and the many small ones are never measured.
    for counts in combinations(outer):
        if is_contained({**counts, kind: ladder[-1]}):
            continue
        rungs = [count for count in ladder if legal(space, {**counts, kind: count})]
        place = number_fitting(rungs, kind, counts, fits)
        if place and not is_contained(largest := {**counts, kind: rungs[place - 1]}):
            found.append(largest)
            yield largest, space.shape(largest)


def number_fitting(
    ladder: Sequence[int], kind: str, counts: Mapping[str, int], fits: Callable[[Mapping[str, int]], bool]
) -> int:
    """How many of an increasing ladder's counts fit beside the others'."""
    return bisect_right(ladder, False, key=lambda count: not fits({**counts, kind: count}))


def combinations(ladders: Sequence[tuple[str, list[int]]]) -> Iterator[dict[str, int]]:
    """All combinations of counts, the largest first."""
    names = [kind for kind, _ in ladders]
    for values in itertools.product(*(ladder[::-1] for _, ladder in ladders)):
        yield dict(zip(names, values, strict=True))


def legal(space: Space, counts: Counts) -> bool:
    return not space.target.faults(space.shape(counts))
