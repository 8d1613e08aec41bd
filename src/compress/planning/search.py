"""Choose among the shapes, or the allocations of ranks, that a budget allows: predict, then try at most three.

The survey predicts to second order what each shape costs the loss: what slicing takes from the stream, and what
deleting units takes from the blocks' outputs; what leaving out blocks costs has been measured. Trials start at the best
prediction and the best one that differs from it; what they find says how much of each part of the costs the refit
leaves, and the best shape by that is the last to be tried. A trial is the whole walk on a part of the calibration
windows, its result thrown away; what counts is its divergence from the dense model's next-token distribution on windows
that nothing was fitted on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.calibration.observers import cost_name
from compress.calibration.streams import spread
from compress.calibration.survey import Survey
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
# What the refit leaves of the costs of the stream, of units and of blocks that are predicted without it, before any
# trial: a mean over small models; of blocks on SmolLM2-135M.
LEFT_OF_STREAM, LEFT_OF_UNITS, LEFT_OF_BLOCKS = 0.4, 1.0, 0.45
FURTHEST = 4.0  # trials move these no further than by this factor


def try_out(prepared: Prepared, choice: Choice, survey: Survey | None, steps: Steps) -> float:
    """Return the mean Kullback-Leibler divergence from the dense model's next-token distribution, in nats."""
    windows = spread(prepared.windows, prepared.job.recipe.trial_samples)
    prepared = replace(prepared, plan=prepared.plan.chosen(choice))
    stages = [stage.in_trials for stage in prepared.plan.stages]
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

    Measure where the cost is predicted least, then where it is least of those that differ in both of its parts. With
    what these two say of the parts the prediction is corrected, and its least place is measured if it is another.
    Without predicted costs those in the middle are measured.
    """
    known = [cost for cost in costs if cost is not None]
    if len(known) < len(costs):
        start = max(0, (len(costs) - MOST_TRIALS) // 2)
        return min(range(start, min(start + MOST_TRIALS, len(costs))), key=measure)
    predicted = [cost.total() for cost in known]
    first = min(range(len(known)), key=predicted.__getitem__)
    values = {first: measure(first)}
    best = known[first]
    others = [place for place, cost in enumerate(known) if cost.coarse != best.coarse and cost.fine != best.fine]
    others = [place for place in others if predicted[place] <= REACH * predicted[first]]
    if others:
        second = min(others, key=predicted.__getitem__)
        values[second] = measure(second)
        scales = corrected([(known[place], value) for place, value in values.items()])
        third = min(range(len(known)), key=lambda place: values.get(place, known[place].total(scales)))
        if third not in values:
            values[third] = measure(third)
    return min(values, key=values.__getitem__)


def corrected(measured: Sequence[tuple["Cost", float]]) -> tuple[float, float]:
    """Fit the scales of the predicted costs' two parts to two measurements, near 1."""
    (one, value), (other, other_value) = measured
    determinant = one.coarse * other.fine - one.fine * other.coarse
    if determinant == 0:
        return (1.0, 1.0)
    coarse = (value * other.fine - other_value * one.fine) / determinant
    fine = (one.coarse * other_value - other.coarse * value) / determinant
    return max(min(coarse, FURTHEST), 1 / FURTHEST), max(min(fine, FURTHEST), 1 / FURTHEST)


@dataclass(frozen=True)
class Cost:
    """Predicted divergence in nats a token, in two parts: of the stream and of units, or of blocks and of both."""

    coarse: float
    fine: float

    def total(self, scales: tuple[float, float] = (1.0, 1.0)) -> float:
        return scales[0] * self.coarse + scales[1] * self.fine


def with_costs(
    prepared: Prepared, survey: Survey | None, without_blocks: Sequence[float]
) -> tuple[list[Choice], list[Cost | None]]:
    """Return the plan's choices, with free neurons allocated, and the predicted cost of each.

    without_blocks: the divergence with one, two, ... blocks left out and nothing refitted.
    """
    choices, budget = list(prepared.plan.choices), prepared.job.recipe.budget
    if survey is None:
        return choices, [None] * len(choices)
    forecast = Forecast.of(prepared, survey, (0.0, *without_blocks))
    if budget is not None and budget.allocation == "free":
        step = prepared.plan.spec.architecture.steps()["neurons"]
        for place, choice in enumerate(choices):
            neurons = forecast.free_neurons(choice.counts, step)
            spec = replace(choice.spec, units={**choice.spec.units, "neurons": neurons})
            choices[place] = Choice({**choice.counts, "neurons": neurons}, spec)
    return choices, [forecast.of_counts(choice.counts) for choice in choices]


@dataclass(frozen=True)
class Forecast:
    """Predict what a shape costs the loss, in nats a token, from a survey of the dense model."""

    survey: Survey
    frame: Frame | None
    without_blocks: Sequence[float]
    num_blocks: int
    num_points: int
    units: Mapping[str, int]

    @classmethod
    def of(cls, prepared: Prepared, survey: Survey, without_blocks: Sequence[float]) -> "Forecast":
        layer_norm = prepared.family.norm == "layer"
        frame, base = shared_frame(prepared.plan.stages, survey, layer_norm=layer_norm), prepared.plan.space.base
        return cls(survey, frame, without_blocks, base.num_blocks, len(base.widths), base.dense_units)

    def kept(self, counts: Counts) -> list[int]:
        return [block for block in range(self.num_blocks) if block not in counts.get("dropped", ())]

    def costs(self, kind: str, blocks: Sequence[int]) -> list[Tensor]:
        """What deleting 0, 1, 2, ... units costs in each of the blocks that the survey knows of."""
        names = [cost_name(kind, block) for block in blocks]
        return [self.survey.unit_costs[name] for name in names if name in self.survey.unit_costs]

    def of_counts(self, counts: Counts) -> Cost | None:
        """Predict the cost of counts; None where the survey lacks a kind of them."""
        kinds, kept = [kind for kind in counts if kind in self.units], self.kept(counts)
        lacks = any(len(self.costs(kind, kept)) < len(kept) for kind in kinds)
        if not kinds or lacks or (self.frame is None and "hidden" in counts):
            return None
        stream = self.stream(int(counts["hidden"])) if "hidden" in counts else 0.0
        stream *= LEFT_OF_STREAM * len(kept) / self.num_blocks
        units = 0.0
        for kind in kinds:
            count, costs = counts[kind], self.costs(kind, kept)
            each = [count] * len(kept) if isinstance(count, int) else count
            units += sum(float(cost[self.units[kind] - n]) for cost, n in zip(costs, each, strict=True))
        units *= LEFT_OF_UNITS
        if "blocks" not in counts:
            return Cost(stream, units)
        return Cost(LEFT_OF_BLOCKS * self.without_blocks[self.num_blocks - len(kept)], stream + units)

    def stream(self, width: int) -> float:
        """1/2 E (g . n R)^2 at all points, n R what the normalized stream n loses; n and the gradient g independent."""
        if self.frame is None or self.survey.gradient is None:
            return 0.0
        C, G = self.survey.moment / self.num_points, self.survey.gradient
        R = self.frame.encode(width) @ self.frame.decode(width) - torch.eye(len(C), dtype=C.dtype, device=C.device)
        return float((C @ R @ G * R).sum() / 2)

    def free_neurons(self, counts: Counts, step: int) -> tuple[int, ...]:
        """Allocate as many neurons in all as the counts give each block alike, by the least predicted cost."""
        most, costs = self.units["neurons"], self.costs("neurons", self.kept(counts))
        least = most + 1 - min(map(len, costs))
        rungs = [count for count in range(step, most + 1, step) if count >= least]
        ladders = {
            str(block): Ladder(rungs, [float(each[most - count]) for count in rungs])
            for block, each in enumerate(costs)
        }
        places = spend(ladders, counts["neurons"] * len(costs))
        assert places is not None
        return tuple(rungs[places[str(block)]] for block in range(len(costs)))
