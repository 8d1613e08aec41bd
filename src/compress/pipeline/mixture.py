"""The types of matrices within a run: found once, by survey and trials, or taken from a frontier.

Where a recipe leaves that open, as many blocks are left out as make the predicted loss of depth and types the least.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from compress.calibration.depth import Depth
from compress.calibration.roundings import RoundedModel
from compress.calibration.survey import Survey
from compress.calibration.weights import renumbered
from compress.checkpoints.metadata import input_fingerprint
from compress.checkpoints.run_folder import RunFolder
from compress.errors import UsageError
from compress.pipeline.frontier import Frontier, Point, read_frontier
from compress.pipeline.latency import TRIES, decode_shares, largest_fast
from compress.pipeline.output import TRIAL
from compress.planning.budget import Choice
from compress.planning.prepare import Prepared, depth_site, new_rounded_model
from compress.planning.search import LEFT_OF_BLOCKS
from compress.planning.types import Types, TypeSearch, improved
from compress.progress import Progress, Steps

CHOSEN, DEPTH, SIZE = "types", "depth", "size"  # the names of what was chosen among the findings
POINTS, MEASURED = 12, 3  # sizes, and how many of them are measured
CHEAP = 0.1  # nats a token: no block is left out where types cost less, for a block costs about as much
PAST = 2  # so many more blocks are tried to go than is best so far


@dataclass
class Trials:
    """Measure sets of types. model: made for the first trial; those of a run that goes on are read back."""

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
        """Measure the next trial; `was_best` says whether the last one was the best so far. None where none is left."""
        if was_best and self.model is not None:
            self.model.keep()
        name, seconds = f"{TRIAL}{self.count}", self.budget.trial_seconds
        if name not in self.folder.findings:
            over = seconds is not None and time.perf_counter() - self.start > seconds
            if self.count >= self.budget.trials or self.prepared.processes.from_first(over):
                return None
        self.steps.next(name)
        self.count += 1
        return self.measured(name, search, types)

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


@dataclass
class DepthChoice:
    """Choose the blocks to leave out under a size: none where types alone cost little.

    For each number of them the loss is predicted: what the refit leaves of the divergence without them, and what the
    best types cost that the matrices of the others get in the bytes that are left.
    dropped, divergences: what has been measured, in the order in which blocks go.
    """

    prepared: Prepared
    survey: Survey
    progress: Progress
    dropped: tuple[int, ...] = ()
    divergences: tuple[float, ...] = ()

    def __call__(self, limit: int) -> list[int]:
        costs, most = [self.cost((), 0.0, limit)], self.prepared.plan.spec.num_blocks - 1

        def enough(dropped: Sequence[int], divergences: Sequence[float]) -> bool:
            for count in range(len(costs), len(dropped) + 1):
                costs.append(self.cost(dropped[:count], divergences[count - 1], limit))
            return min(costs) < math.inf and len(costs) > costs.index(min(costs)) + PAST

        if costs[0] <= CHEAP:
            return []
        if not enough(self.dropped, self.divergences) and len(self.dropped) < most:
            del costs[1:]
            steps = Steps(self.progress, "choosing blocks", 1 + PAST)

            def begin(step: str) -> None:
                steps.total = max(steps.total, int(steps.done) + 2)  # how many blocks will do is found on the way
                steps.next(step)

            def is_enough(depth: Depth) -> bool:
                return enough(depth.dropped, depth.divergences)

            depth = depth_site(self.prepared, most, begin, is_enough)
            next(stage for stage in self.prepared.plan.stages if stage.site is Depth).apply(depth)
            steps.end()
            self.dropped, self.divergences = depth.dropped, depth.divergences
            enough(self.dropped, self.divergences)
        return [*self.dropped[: costs.index(min(costs))]]

    def cost(self, dropped: Sequence[int], divergence: float, limit: int) -> float:
        space = self.prepared.without(dropped).types
        assert space is not None
        if not space.least <= limit < space.most:
            return math.inf
        search = TypeSearch.of(space, self.survey.roundings)
        return LEFT_OF_BLOCKS * divergence + search.predicted(search.allocated(limit))


def chosen_types(prepared: Prepared, folder: RunFolder, survey: Survey | None, progress: Progress) -> Prepared:
    """With types, and blocks to leave out, chosen that the budget allows; a run that goes on reads them back."""
    budget, depth = prepared.job.recipe.budget, None
    assert budget is not None
    if "blocks" in prepared.plan.spec.undecided and survey is not None:
        depth = DepthChoice(prepared, survey, progress)
    limit = budget.target_size or fast_size(prepared, folder, survey, depth, progress)
    if "blocks" in prepared.plan.spec.undecided:
        if DEPTH not in folder.findings:
            folder.note(DEPTH, {"dropped": [] if depth is None else depth(limit)})
        prepared = prepared.without(folder.findings[DEPTH].data["dropped"])
    assert prepared.types is not None
    prepared.types.check(limit)
    if CHOSEN not in folder.findings:
        folder.note(CHOSEN, found_types(prepared, folder, survey, limit, progress))
    return decided(prepared, folder.findings[CHOSEN].data)


def found_types(prepared: Prepared, folder: RunFolder, survey: Survey | None, limit: int, progress: Progress) -> Types:
    """The best types under a size, by trials or from a frontier."""
    job, space = prepared.job, prepared.types
    assert space is not None
    if job.frontier is None:
        assert survey is not None
        return searched(prepared, folder, survey, limit, progress)[1]
    frontier = read_frontier(job.frontier)
    if frontier.model != input_fingerprint(prepared.folder, prepared.weights):
        raise UsageError(
            f"The frontier in {job.frontier} is of another model, {frontier.base_model}. Name that one, or make "
            "another frontier."
        )
    for place, point in enumerate(frontier.points):
        told = {"bytes": point.bytes, "predicted": point.predicted, "divergence": point.measured}
        folder.note(f"{TRIAL}{place}", told)
    return frontier.search(space).allocated(limit)


def decided(prepared: Prepared, types: Types) -> Prepared:
    """With types of matrices, which have the dense model's paths."""
    plan, space = prepared.plan, prepared.types
    assert space is not None
    path_of = partial(renumbered, numbers={dense: block for block, dense in enumerate(plan.kept)})
    types, tables = {path_of(path): name for path, name in types.items()}, {*map(path_of, space.tables)}
    counts = {
        "types": {path: name for path, name in types.items() if path not in tables},
        "tables": {path: name for path, name in types.items() if path in tables},
    }
    return replace(prepared, plan=plan.chosen(Choice(counts, plan.space.spec(counts))))


def fast_size(
    prepared: Prepared, folder: RunFolder, survey: Survey | None, depth: DepthChoice | None, progress: Progress
) -> int:
    """The largest size whose decode time is within the budget's share of the dense model's, measured."""
    budget, space = prepared.job.recipe.budget, prepared.types
    assert budget is not None
    assert space is not None
    if SIZE not in folder.findings:
        assert survey is not None
        least, target, roundings = space.least, budget.target_latency or 0.0, survey.roundings
        if depth is not None and (one := prepared.without(range(1, prepared.plan.spec.num_blocks)).types) is not None:
            least = one.least
        steps = Steps(progress, "timing sizes", TRIES)
        with decode_shares(prepared) as share_of:

            def measure(size: int) -> float:
                steps.next(f"{size:,} bytes")
                shallower = prepared if depth is None else prepared.without(depth(size))
                assert shallower.types is not None
                types = TypeSearch.of(shallower.types, roundings).allocated(size)
                return prepared.processes.from_first(share_of(decided(shallower, types)))  # all go the same way

            size, share = largest_fast(least, space.most, target, measure)
        steps.end()
        folder.note(SIZE, {"target_size": size, "decode_time": share})
    return int(folder.findings[SIZE].data["target_size"])


def frontier_points(
    prepared: Prepared, folder: RunFolder, survey: Survey, between: tuple[int, int], progress: Progress
) -> Frontier:
    """The types at sizes from the first to the second: trials in the middle, three sizes measured."""
    job = prepared.job
    assert job.recipe.budget is not None
    search, _, trials = searched(prepared, folder, survey, job.recipe.budget.target_size or 0, progress)
    points, (least, most) = list[Point](), between
    measured = {place * (POINTS - 1) // (MEASURED - 1) for place in range(MEASURED)}
    steps = Steps(progress, "measuring sizes", MEASURED)
    for place in range(POINTS):  # at equal ratios
        size, divergence = round(least * (most / least) ** (place / (POINTS - 1))), None
        types = search.allocated(size)
        if place in measured:
            steps.next(f"{size:,} bytes")
            divergence = trials.measured(f"point {place}", search, types)
        predicted, count = search.predicted(types), search.space.bytes_of(types)
        points.append(Point(bytes=count, predicted=predicted, measured=divergence, types=types))
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
