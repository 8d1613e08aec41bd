"""Which of the shapes that a budget allows: by trial, on a part of the calibration windows.

A trial is the whole walk on fewer windows, its parts thrown away. What counts is how far its next-token distribution
is from the dense model's on windows that nothing was fitted on. The choices lie on a line, from a narrow stream with
wide MLPs to the reverse, and the divergence along it has one valley, so few trials find it.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compress.architectures.architecture import Shape, dense_units
from compress.assembly import new_walk
from compress.budget import Choice, Counts
from compress.errors import UsageError
from compress.preflight import Prepared
from compress.streaming.survey import Survey

HELD_OUT = 4  # one window in so many


@dataclass(frozen=True)
class Trial:
    """
    divergence: mean Kullback-Leibler divergence from the dense model's next-token distribution, in nats.
    """

    counts: Counts
    divergence: float

    @property
    def neurons(self) -> tuple[int, ...]:
        """Of each block, where a trial says it block by block."""
        found = self.counts["neurons"]
        assert isinstance(found, tuple)
        return found


def compare(prepared: Prepared, survey: Survey | None, heard: Callable[[Trial], None]) -> list[Trial]:
    """Trials of the plan's choices, that of the least divergence among them. `heard` hears of each."""
    windows = spread(prepared.windows, prepared.job.recipe.trial_samples)
    trials: dict[int, Trial] = {}

    def divergence(index: int) -> float:
        if index not in trials:
            trials[index] = try_out(prepared, found[index], windows, survey)
            heard(trials[index])
        return trials[index].divergence

    found = prepared.plan.choices
    lowest(divergence, len(found))
    return [trials[index] for index in sorted(trials)]


def allocate(prepared: Prepared, choice: Choice, survey: Survey | None, heard: Callable[[Trial], None]) -> list[Trial]:
    """Trials of the choice with its neurons spread over the blocks in other ways, as many in all; the even way first.

    Each trial moves some neurons from one block, drawn at random, to another, and stays where the divergence fell.
    Where none of many falls any more, fewer are moved.
    """
    budget, rng = prepared.job.recipe.budget, random.Random(prepared.job.recipe.seed)
    assert budget is not None
    windows, blocks = spread(prepared.windows, budget.trial_samples), int(prepared.config.num_hidden_layers)
    step = prepared.plan.target.steps()["neurons"]
    uniform, most = choice.counts["neurons"], dense_units(prepared.config, prepared.family)["neurons"]
    assert isinstance(uniform, int)
    trials = [try_out(prepared, reshaped(choice, (uniform,) * blocks), windows, survey)]
    best, moved, failed = trials[0], max(step, uniform // 6 // step * step), 0
    while len(trials) <= budget.allocation_trials and moved >= step and blocks > 1:
        given, taken = rng.sample(range(blocks), 2)
        counts = list(best.neurons)
        counts[given], counts[taken] = counts[given] + moved, counts[taken] - moved
        if counts[given] <= most and counts[taken] >= step and tuple(counts) not in [trial.neurons for trial in trials]:
            trials.append(try_out(prepared, reshaped(choice, tuple(counts)), windows, survey))
            heard(trials[-1])
            if trials[-1].divergence < best.divergence:
                best, failed = trials[-1], -1
        failed += 1
        if failed >= 2 * blocks:
            moved, failed = moved // 2 // step * step, 0
    return trials


def reshaped(choice: Choice, neurons: tuple[int, ...]) -> Choice:
    """The choice with so many neurons in each block."""
    units = {**choice.shape.units, "neurons": neurons}
    return Choice({**choice.counts, "neurons": neurons}, Shape(choice.shape.widths, units), choice.size)


def try_out(prepared: Prepared, choice: Choice, windows: Tensor, survey: Survey | None) -> Trial:
    stages = prepared.plan.chosen(choice).stages
    walk = new_walk(prepared, stages, windows, max(1, len(windows) // HELD_OUT), survey)
    divergence: float | None = None
    for part in walk.parts():
        divergence = part.divergence
    if divergence is None:
        raise UsageError(
            "Choices are compared by how far the anchored walk ends from the dense model. Add a refit stage."
        )
    return Trial(choice.label, divergence)


def spread(windows: Tensor, count: int) -> Tensor:
    """So many of the windows, evenly spread."""
    count = min(count, len(windows))
    return windows[[index * len(windows) // count for index in range(count)]]


def lowest(value: Callable[[int], float], count: int) -> int:
    """The argument below `count` of the least value of a function with one valley; not every value is asked for."""
    step = max(1, count // 3)
    best = min(range(step // 2, count, step), key=value)
    while step > 1:
        step = (step + 1) // 2
        best = min((i for i in (best - step, best, best + step) if 0 <= i < count), key=value)
    while (better := min((i for i in (best - 1, best, best + 1) if 0 <= i < count), key=value)) != best:
        best = better
    return best


def as_data(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    return [{**trial.counts, "divergence": trial.divergence} for trial in trials]
