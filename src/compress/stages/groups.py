"""Stages of what is fitted together: groups of linears solved again, whole units deleted, whole blocks left out."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from compress import families
from compress.architectures.architecture import ModelSpec
from compress.calibration.depth import Depth
from compress.calibration.groups import LinearGroup, Writers
from compress.calibration.sites import Count, Requirements
from compress.calibration.survey import SurveyNeed
from compress.errors import UsageError, report
from compress.models.loading import with_blocks
from compress.numerics.obs import compensated, elimination
from compress.numerics.ridge import choose_damping, ridge
from compress.stages._stage import StageConfig

TRIAL_DAMPING = 0.03
FIRST_TRIED, THEN_TRIED = 6, 3
Kept = Annotated[int, Field(ge=1)]


class Refit(StageConfig):
    """The anchored refit: what reads and what writes the compressed stream is solved again, toward the dense model.

    Every group of linears is asked to make of what the compressed prefix gives it what the dense model had at its
    place, by ridge regression toward the weights it has (`calibration/groups.py` says what that means for readers and
    writers, `numerics/ridge.py` how it is solved). Errors of the prefix are made up for by the groups after it, which a
    method that lets each layer reproduce itself cannot do. Nothing changes where the compressed prefix is the dense
    one.

    How strongly a group is drawn toward its weights is chosen on windows that it is not fitted on; where no fit is
    better there than the weights as they are, they stay. So do those of an expert that none of these windows' tokens
    reach.

    held_out: the share of the calibration windows to choose the damping on. damping: a fixed one instead, in units of
        the mean diagonal of the inputs' second moment.
    """

    site: ClassVar = LinearGroup
    stage: Literal["refit"] = "refit"
    held_out: Annotated[float, Field(gt=0, le=0.5)] = 0.125
    damping: Annotated[float, Field(gt=0)] | None = None

    @property
    def requires(self) -> Requirements:
        return Requirements(held_out=self.held_out)

    @property
    def in_trials(self) -> "Refit":
        return self if self.damping else self.model_copy(update={"damping": TRIAL_DAMPING})

    def apply(self, group: LinearGroup) -> None:
        if self.damping is not None:
            group.matrix, group.damping = ridge(group.fit, group.matrix, self.damping, name=group.name), self.damping
        elif group.held_out.tokens:
            chosen = choose_damping(group.fit, group.held_out, group.matrix, name=group.name, metric=group.metric)
            if chosen is not None:
                group.matrix = chosen.W
                group.damping = group.notes["damping"] = chosen.damping


class PruneUnits(StageConfig):
    """Deleting whole units of a branch: MLP neurons, or KV groups with their query heads; as many in every block.

    The units whose loss the branch's writer can make up for best go first, one after the other, and the rest of the
    writer takes over what they did: structured Optimal Brain Surgeon on the group's own equations (`numerics/obs.py`).
    One count for all blocks, so that the model keeps the shape of a stock one. After `refit` the writer is the anchored
    solution, so units are judged by what they do toward the dense stream; without it, by what they do for the branch as
    it is.

    units: `neurons` or `kv_groups`.
    ratio: the share of them to delete, or keep: how many stay, one number for all blocks or one a block, or neither of
        the two where a budget of the recipe decides.
    round_to: counts that a ratio gives are rounded down to a multiple; by default what suits the architecture.
    """

    site: ClassVar = Writers
    reshapes: ClassVar = True
    rules: ClassVar = ("ratio", "keep")
    stage: Literal["prune_units"] = "prune_units"
    units: Literal["neurons", "kv_groups"]
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    keep: Kept | tuple[Kept, ...] | None = None
    round_to: Annotated[int, Field(ge=1)] | None = None

    @property
    def opens(self) -> str | None:
        return None if self.told else self.units

    @property
    def requires(self) -> Requirements:
        return Requirements(survey=SurveyNeed.UNITS | SurveyNeed.GRADIENT if self.opens else SurveyNeed.NONE)

    @property
    def step(self) -> int:
        return self.round_to or 1

    def decided(self, choice: Mapping[str, Count]) -> "PruneUnits":
        return self.model_copy(update={"keep": choice[self.units]}) if self.opens else self

    def plan(self, spec: ModelSpec) -> tuple["PruneUnits", ModelSpec]:
        count, before = spec.dense_units.get(self.units), spec.units.get(self.units)
        if count is None or before is None:
            raise UsageError(
                f"This model has no {self.units} that could be deleted in every block. Leave prune_units out: "
                "compress slice --ratio narrows the stream alone."
            )
        stage = self if self.round_to else self.model_copy(update={"round_to": spec.architecture.steps()[self.units]})
        if stage.opens:
            return stage, replace(spec, undecided=spec.undecided | {self.units})
        report(stage.problems(count, spec.num_blocks))
        kept = stage.kept(count)
        if isinstance(kept, int):
            kept = before if isinstance(before, tuple) else min(kept, before)
        return stage, replace(spec, units={**spec.units, self.units: kept})

    def kept(self, count: int) -> Count:
        """How many of `count` units it leaves in the blocks."""
        if self.keep is not None:
            return self.keep
        assert self.ratio is not None
        kept = int((1 - self.ratio) * count)
        return max(kept - kept % self.step, self.step)

    def problems(self, count: int, num_blocks: int) -> list[str]:
        """What does not fit a model whose blocks have `count` units."""
        kept = self.kept(count)
        each = kept if isinstance(kept, tuple) else (kept,) * num_blocks
        if len(each) != num_blocks:
            return [f"prune_units keeps {len(each)} numbers of {self.units}, the model has {num_blocks} blocks."]
        if max(each) > count:
            return [f"prune_units keeps {max(each)} {self.units}, the model has {count}. Keep fewer."]
        if self.ratio is not None and (1 - self.ratio) * count < self.step:
            return [
                f"The ratio {self.ratio} leaves less than {self.round_to} of {count} {self.units}. Use a smaller one."
            ]
        return []

    def apply(self, writers: Writers) -> None:
        units = writers.unit_inputs(self.units)
        if units is None:
            return
        planned = self.kept(len(units))
        keep = planned[writers.block] if isinstance(planned, tuple) else planned
        if keep < len(units):
            W, G, damping, name = writers.matrix, writers.fit.G, writers.damping, writers.name
            kept = elimination(W, G, units, keep, damping=damping, name=name).kept(keep)
            writers.matrix = compensated(W, G, units, kept, damping=damping, name=name)
            writers.keep(self.units, kept)


class DropBlocks(StageConfig):
    """Leaving out whole blocks: those without which the model's next-token distribution changes least.

    Chosen one after another by the divergence from the dense model on a few calibration windows, of candidates whose
    output is most like their input (ShortGPT, arXiv 2403.03853). A refit in the same recipe brings the stream of what
    is left back to the dense one: what writes before a gap is fitted to the stream after it.

    count: how many to leave out, keep: how many stay, or blocks: which ones to leave out, counted from 0; none of these
        where a budget of the recipe decides.
    """

    site: ClassVar = Depth
    rules: ClassVar = ("count", "keep", "blocks")
    stage: Literal["drop_blocks"] = "drop_blocks"
    count: Annotated[int, Field(ge=1)] | None = None
    keep: Annotated[int, Field(ge=1)] | None = None
    blocks: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, min_length=1)

    @property
    def opens(self) -> str | None:
        return None if self.told else "blocks"

    @property
    def dropped(self) -> tuple[int, ...]:
        return self.blocks or ()

    def decided(self, choice: Mapping[str, Any]) -> "DropBlocks":
        if choice.get("dropped"):
            return self.model_copy(update={"count": None, "keep": None, "blocks": tuple(choice["dropped"])})
        return self.model_copy(update={"keep": choice["blocks"]}) if self.opens else self

    def plan(self, spec: ModelSpec) -> tuple["DropBlocks", ModelSpec]:
        if self.opens:
            return self, replace(spec, undecided=spec.undecided | {"blocks"})
        number = spec.num_blocks
        count = self.count if self.keep is None else number - self.keep
        dropped = set(range(number - (count or 0), number) if self.blocks is None else self.blocks)
        if len(dropped) >= number or max(dropped, default=0) >= number or (count or 0) < 0:
            said = ", ".join(f"{rule} {getattr(self, rule)}" for rule in self.told)
            raise UsageError(f"drop_blocks has {said}; the model has {number} blocks, counted from 0. Leave out fewer.")
        architecture = spec.architecture
        kept = [block for block in range(number) if block not in dropped]
        dense = with_blocks(architecture.dense, kept)
        shallower = replace(architecture, dense=dense, family=families.find(dense))
        return self, replace(ModelSpec.dense(shallower, spec.dtype), notes=spec.notes)

    def apply(self, depth: Depth) -> None:
        """Choose the blocks greedily; candidates are those of least measured rise, and the next by similarity."""
        similarity = depth.similarities()
        waiting = sorted(range(depth.num_blocks), key=lambda block: -similarity[block])
        rises, reached = dict[int, float](), 0.0
        while len(depth.dropped) < depth.wanted and not depth.enough(depth):
            tried = sorted(rises, key=rises.__getitem__)[: THEN_TRIED - 1]
            fresh = THEN_TRIED - len(tried) if rises else FIRST_TRIED
            tried, waiting = [*tried, *waiting[:fresh]], waiting[fresh:]
            found = depth.measure([(*depth.dropped, block) for block in tried])
            rises |= {block: value - reached for block, value in zip(tried, found, strict=True)}
            best = min(tried, key=rises.__getitem__)
            reached += rises.pop(best)
            depth.dropped, depth.divergences = (*depth.dropped, best), (*depth.divergences, reached)
