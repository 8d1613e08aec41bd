"""The types of a GGUF file's matrices within a run: found once, by survey and trials, or taken from a frontier."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from compress.calibration.roundings import RoundedModel
from compress.calibration.survey import Survey
from compress.checkpoints.metadata import input_fingerprint
from compress.checkpoints.run_folder import RunFolder
from compress.errors import UsageError
from compress.models.storage import Storage
from compress.pipeline.output import TRIAL
from compress.planning.budget import Choice
from compress.planning.frontier import MEASURED, Frontier, Point, read_frontier, sizes_between
from compress.planning.prepare import Prepared, new_rounded_model
from compress.planning.types import Types, TypeSearch, improved
from compress.progress import Progress, Steps

CHOSEN = "types"  # the name of what was chosen among the findings


@dataclass
class Trials:
    """
    model: made when the first trial is measured; those of a run that goes on are read back.
    """

    prepared: Prepared
    folder: RunFolder
    survey: Survey
    steps: Steps
    model: RoundedModel | None = None
    count: int = 0

    def __post_init__(self) -> None:
        assert self.prepared.job.recipe.budget is not None
        self.budget, self.start = self.prepared.job.recipe.budget, time.perf_counter()

    def __call__(self, search: TypeSearch, types: Types, was_best: bool) -> float | None:
        """Measure the next trial; `was_best` says whether the last one was the best so far."""
        if was_best and self.model is not None:
            self.model.keep()
        name = f"{TRIAL}{self.count}"
        if name not in self.folder.findings and not self.is_left():
            return None
        self.steps.next(name)
        found = self.measured(name, search, types)
        self.count += 1
        return found

    def is_left(self) -> bool:
        seconds = self.budget.trial_seconds
        over = seconds is not None and time.perf_counter() - self.start > seconds
        return self.count < self.budget.trials and not self.prepared.processes.from_first(over)

    def measured(self, name: str, search: TypeSearch, types: Types) -> float:
        """The divergence of types, as it was noted by that name."""
        if name not in self.folder.findings:
            if self.model is None:
                self.model = new_rounded_model(self.prepared, self.survey)
            divergence = self.model.divergence(types)
            factors = {group: round(factor, 4) for group, factor in search.factors.items() if factor != 1}
            predicted = replace(search, factors={}).predicted(types)  # alike for all trials
            said = {"bytes": search.space.bytes_of(types), "predicted": predicted, "factors": factors}
            self.folder.note(name, {**said, "divergence": divergence})
        return float(self.folder.findings[name].data["divergence"])


def searched(
    prepared: Prepared, folder: RunFolder, survey: Survey, limit: int, progress: Progress
) -> tuple[TypeSearch, Types, Trials]:
    assert prepared.types is not None
    assert prepared.job.recipe.budget is not None
    steps = Steps(progress, "trying types", max(1, prepared.job.recipe.budget.trials))
    trials = Trials(prepared, folder, survey, steps)
    search, types = improved(TypeSearch.of(prepared.types, survey.roundings), limit, trials)
    steps.end()
    return search, types, trials


def chosen_types(prepared: Prepared, folder: RunFolder, survey: Survey | None, progress: Progress) -> Prepared:
    """With the types chosen that the budget allows; a run that goes on reads them back."""
    job, space = prepared.job, prepared.types
    assert job.recipe.budget is not None
    assert space is not None
    limit = job.recipe.budget.target_size or 0
    if CHOSEN in folder.findings:
        types = folder.findings[CHOSEN].data
    elif job.frontier is not None:
        types = own_frontier(prepared).search(space).allocated(limit)
    else:
        assert survey is not None
        _, types, _ = searched(prepared, folder, survey, limit, progress)
    if CHOSEN not in folder.findings:
        folder.note(CHOSEN, types)
    storage = {path: Storage(form="gguf", bits=None, block_type=name) for path, name in types.items()}
    spec = replace(prepared.plan.spec, storage=storage, undecided=frozenset())
    tables = {path: name for path, name in types.items() if path in space.tables}
    linears = {path: name for path, name in types.items() if path not in space.tables}
    return replace(prepared, plan=prepared.plan.chosen(Choice({"types": linears, "tables": tables}, spec)))


def own_frontier(prepared: Prepared) -> Frontier:
    """The frontier that the job names. Raises UsageError where it is of another model."""
    assert prepared.job.frontier is not None
    found = read_frontier(prepared.job.frontier)
    if found.model != input_fingerprint(prepared.folder, prepared.weights):
        raise UsageError(
            f"The frontier in {prepared.job.frontier} is of another model, {found.base_model}. Name that one, or make "
            "another frontier."
        )
    return found


def frontier_points(
    prepared: Prepared, folder: RunFolder, survey: Survey, between: tuple[int, int], progress: Progress
) -> Frontier:
    """The types at sizes from the first to the second: trials in the middle, three sizes measured."""
    job = prepared.job
    assert job.recipe.budget is not None
    search, _, trials = searched(prepared, folder, survey, job.recipe.budget.target_size or 0, progress)
    sizes, points = sizes_between(*between), list[Point]()
    measured = {place * (len(sizes) - 1) // (MEASURED - 1) for place in range(MEASURED)}
    steps = Steps(progress, "measuring sizes", MEASURED)
    for place, size in enumerate(sizes):
        types, divergence = search.allocated(size), None
        if place in measured:
            steps.next(f"{size:,} bytes")
            divergence = trials.measured(f"point {place}", search, types)
        told: Mapping[str, Any] = {"bytes": search.space.bytes_of(types), "predicted": search.predicted(types)}
        points.append(Point(**told, measured=divergence, types=types))
    steps.end()
    return Frontier(
        base_model=job.model.repository or job.model.name,
        model=input_fingerprint(prepared.folder, prepared.weights),
        recipe=job.recipe.model_dump(mode="json", exclude_none=True),
        costs={path: dict(costs) for path, costs in search.costs.items()},
        factors=dict(search.factors),
        scale=search.scale,
        points=points,
    )
