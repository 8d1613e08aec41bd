"""Deleting whole units of a branch: MLP neurons, or KV groups with their query heads; as many in every block.

The units whose loss the branch's writer can make up for best go first, one after the other, and the rest of the writer
takes over what they did: structured Optimal Brain Surgeon on the group's own equations (`numerics/obs.py`). One count
for all blocks, so that the model keeps the shape of a stock one.

After `refit` the writer is the anchored solution, so units are judged by what they do toward the dense stream; without
it, by what they do for the branch as it is.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from compress.architectures.architecture import ModelSpec
from compress.calibration.groups import Writers
from compress.calibration.sites import Count, Requirements
from compress.calibration.survey import SurveyNeed
from compress.errors import UsageError, report
from compress.numerics.obs import compensated, elimination
from compress.stages._stage import StageConfig

Kept = Annotated[int, Field(ge=1)]


class PruneUnits(StageConfig):
    """
    units: `neurons` or `kv_groups`.
    ratio: the share of them to delete, or keep: how many stay, one number for all blocks or one a block, or neither of
        the two where a budget of the recipe decides.
    round_to: counts that a ratio gives are rounded down to a multiple; by default what suits the architecture.
    """

    site: ClassVar = Writers
    reshapes: ClassVar = True
    stage: Literal["prune_units"] = "prune_units"
    units: Literal["neurons", "kv_groups"]
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    keep: Kept | tuple[Kept, ...] | None = None
    round_to: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _one_rule(self) -> "PruneUnits":
        if self.ratio is not None and self.keep is not None:
            raise ValueError("prune_units takes ratio or keep, got both")
        return self

    @property
    def opens(self) -> str | None:
        return self.units if self.ratio is None and self.keep is None else None

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
            raise UsageError(f"This model has no {self.units} that could be deleted.")
        stage = self if self.round_to else self.model_copy(update={"round_to": spec.architecture.steps()[self.units]})
        report(stage.problems(count, spec.num_blocks))
        if stage.opens:
            return stage, replace(spec, undecided=spec.undecided | {self.units})
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
        if self.opens:
            return []
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
        if keep == len(units):
            return
        W, G, damping, name = writers.matrix, writers.fit.G, writers.damping, writers.name
        kept = elimination(W, G, units, keep, damping=damping, name=name).kept(keep)
        writers.matrix = compensated(W, G, units, kept, damping=damping, name=name)
        writers.keep(self.units, kept)
