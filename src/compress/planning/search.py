"""Choose among the shapes, or the allocations of ranks, that a budget allows: predict, then try at most three.

The survey predicts to second order what each shape costs the loss: what slicing takes from the stream, and what
deleting units takes from the blocks' outputs. Trials start at the best prediction and its better neighbor; what they
find says how much of each of the two costs the refit leaves, and the best shape by that is the last to be tried. A
trial is the whole walk on a part of the calibration windows, its result thrown away; what counts is its divergence
from the dense model's next-token distribution on windows that nothing was fitted on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.calibration.streams import spread
from compress.calibration.survey import Survey
from compress.calibration.unit_costs import cost_name
from compress.calibration.walk import shared_frame
from compress.errors import UsageError
from compress.numerics.allocation import Ladder, spend
from compress.numerics.frames import Frame
from compress.planning.budget import Choice, Counts
from compress.planning.prepare import Prepared, new_walk
from compress.progress import Steps

HELD_OUT = 4  # one window in so many
MOST_TRIALS = 3
REACH = 2.0  # times the best prediction: a neighbor predicted to be worse is not tried
# What the refit leaves of the predicted costs of the stream and of units, before any trial: a mean over small models.
LEFT = (0.4, 1.0)
FURTHEST = 4.0  # trials move these no further than by this factor


def try_out(prepared: Prepared, choice: Choice, survey: Survey | None, steps: Steps) -> float:
    """Return the mean Kullback-Leibler divergence from the dense model's next-token distribution, in nats."""
    windows = spread(prepared.windows, prepared.job.recipe.trial_samples)
    stages = [stage.in_trials for stage in prepared.plan.chosen(choice).stages]
    walk = new_walk(prepared, stages, windows, max(1, len(windows) // HELD_OUT), survey)
    divergence: float | None = None
    for part in walk.parts(lambda name: steps.begin(name, share=walk.next_part / walk.num_parts)):
        divergence = part.divergence
    steps.advance()
    if divergence is None:
        raise UsageError(
            "Choices are compared by how far the anchored walk ends from the dense model. Add a refit stage."
        )
    return divergence


def choose(costs: Sequence["Cost | None"], measure: Callable[[int], float]) -> int:
    """Find the index of the least value by at most `MOST_TRIALS` measurements.

    Measure where the cost is predicted least, then its neighbor of less predicted cost. With what these two say of the
    costs' two terms the prediction is corrected, and its least place is measured if it is another. Without predicted
    costs those in the middle are measured.
    """
    known = [cost for cost in costs if cost is not None]
    if len(known) < len(costs):
        start = max(0, (len(costs) - MOST_TRIALS) // 2)
        return min(range(start, min(start + MOST_TRIALS, len(costs))), key=measure)
    predicted = [cost.total(LEFT) for cost in known]
    first = min(range(len(known)), key=predicted.__getitem__)
    values = {first: measure(first)}
    neighbors = [place for place in (first - 1, first + 1) if 0 <= place < len(known)]
    neighbors = [place for place in neighbors if predicted[place] <= REACH * predicted[first]]
    if neighbors:
        second = min(neighbors, key=predicted.__getitem__)
        values[second] = measure(second)
        left = corrected([(known[place], value) for place, value in values.items()])
        third = min(range(len(known)), key=lambda place: values.get(place, known[place].total(left)))
        if third not in values:
            values[third] = measure(third)
    return min(values, key=values.__getitem__)


def corrected(measured: Sequence[tuple["Cost", float]]) -> tuple[float, float]:
    """Fit the two coefficients of the predicted costs to two measurements, near their prior values."""
    (one, value), (other, other_value) = measured
    determinant = one.stream * other.units - one.units * other.stream
    if determinant == 0:
        return LEFT
    stream = (value * other.units - other_value * one.units) / determinant
    units = (one.stream * other_value - other.stream * value) / determinant
    low, high = zip(*((share / FURTHEST, share * FURTHEST) for share in LEFT), strict=True)
    return min(max(stream, low[0]), high[0]), min(max(units, low[1]), high[1])


@dataclass(frozen=True)
class Cost:
    """Predicted rise of the loss before the refit, in nats a token: from the stream, and from units."""

    stream: float
    units: float

    def total(self, left: tuple[float, float]) -> float:
        return left[0] * self.stream + left[1] * self.units


def with_costs(prepared: Prepared, survey: Survey | None) -> tuple[list[Choice], list[Cost | None]]:
    """Return the plan's choices, with free neurons allocated, and the predicted cost of each."""
    choices, budget = list(prepared.plan.choices), prepared.job.recipe.budget
    if survey is None:
        return choices, [None] * len(choices)
    forecast = Forecast.of(prepared, survey)
    if budget is not None and budget.allocation == "free":
        step = prepared.plan.spec.architecture.steps()["neurons"]
        for place, choice in enumerate(choices):
            neurons = forecast.free_neurons(choice.counts["neurons"], step)
            spec = replace(choice.spec, units={**choice.spec.units, "neurons": neurons})
            choices[place] = Choice({**choice.counts, "neurons": neurons}, spec)
    return choices, [forecast.of_counts(choice.counts) for choice in choices]


@dataclass(frozen=True)
class Forecast:
    """Predict what a shape costs the loss, in nats a token, from a survey of the dense model."""

    survey: Survey
    frame: Frame | None
    num_blocks: int
    num_points: int
    units: Mapping[str, int]

    @classmethod
    def of(cls, prepared: Prepared, survey: Survey) -> "Forecast":
        layer_norm = prepared.family.norm == "layer"
        frame = shared_frame(prepared.plan.stages, survey, layer_norm=layer_norm)
        blocks, points = prepared.plan.spec.num_blocks, len(prepared.plan.spec.widths)
        return cls(survey, frame, blocks, points, prepared.plan.spec.dense_units)

    def costs(self, kind: str) -> list[Tensor]:
        """What deleting 0, 1, 2, ... units costs in each block that the survey knows of."""
        names = [cost_name(kind, block) for block in range(self.num_blocks)]
        return [self.survey.unit_costs[name] for name in names if name in self.survey.unit_costs]

    def of_counts(self, counts: Counts) -> Cost | None:
        """Predict the cost of counts; None where the survey lacks a kind of them."""
        kinds = [kind for kind in counts if kind in self.units]
        lacks = any(len(self.costs(kind)) < self.num_blocks for kind in kinds)
        if not kinds or lacks or (self.frame is None and "hidden" in counts):
            return None
        hidden = self.stream(int(counts["hidden"])) if "hidden" in counts else 0.0
        return Cost(hidden, sum(self._of_units(kind, counts[kind]) for kind in kinds))

    def stream(self, width: int) -> float:
        """1/2 E (g . n R)^2 at all points, n R what the normalized stream n loses; n and the gradient g independent."""
        if self.frame is None or self.survey.gradient is None:
            return 0.0
        C, G = self.survey.moment / self.num_points, self.survey.gradient
        R = self.frame.encode(width) @ self.frame.decode(width) - torch.eye(len(C), dtype=C.dtype, device=C.device)
        return float((C @ R @ G * R).sum() / 2)

    def _of_units(self, kind: str, count: int | Sequence[int]) -> float:
        kept = [count] * self.num_blocks if isinstance(count, int) else count
        return sum(float(costs[self.units[kind] - each]) for costs, each in zip(self.costs(kind), kept, strict=True))

    def free_neurons(self, uniform: int, step: int) -> tuple[int, ...]:
        """Allocate as many neurons in all as `uniform` in each block, by the least predicted cost."""
        most, costs = self.units["neurons"], self.costs("neurons")
        least = most + 1 - min(map(len, costs))
        counts = [count for count in range(step, most + 1, step) if count >= least]
        ladders = {
            str(block): Ladder(counts, [float(each[most - count]) for count in counts])
            for block, each in enumerate(costs)
        }
        places = spend(ladders, uniform * self.num_blocks)
        assert places is not None
        return tuple(counts[places[str(block)]] for block in range(self.num_blocks))
