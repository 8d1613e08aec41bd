"""Leaving out whole blocks: those without which the model's next-token distribution changes least.

Chosen one after another by the divergence from the dense model on a few calibration windows, of candidates whose
output is most like their input (ShortGPT, arXiv 2403.03853). A refit in the same recipe brings the stream of what is
left back to the dense one: what writes before a gap is fitted to the stream after it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from compress.architectures.architecture import ModelSpec
from compress.calibration.depth import Depth
from compress.errors import UsageError
from compress.models.loading import with_blocks
from compress.stages._stage import StageConfig

RULES = ("count", "keep", "blocks")
FIRST_TRIED, THEN_TRIED = 6, 3


class DropBlocks(StageConfig):
    """
    count: how many to leave out, keep: how many stay, or blocks: which ones to leave out, counted from 0; none of these
        where a budget of the recipe decides.
    """

    site: ClassVar = Depth
    stage: Literal["drop_blocks"] = "drop_blocks"
    count: Annotated[int, Field(ge=1)] | None = None
    keep: Annotated[int, Field(ge=1)] | None = None
    blocks: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _one_rule(self) -> "DropBlocks":
        given = [rule for rule in RULES if getattr(self, rule) is not None]
        if len(given) > 1:
            raise ValueError(f"drop_blocks takes one of {', '.join(RULES)}; got {', '.join(given)}")
        return self

    @property
    def opens(self) -> str | None:
        return None if any(getattr(self, rule) is not None for rule in RULES) else "blocks"

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
            said = ", ".join(f"{rule} {getattr(self, rule)}" for rule in RULES if getattr(self, rule) is not None)
            raise UsageError(f"drop_blocks has {said}; the model has {number} blocks, counted from 0. Leave out fewer.")
        architecture = spec.architecture
        kept = [block for block in range(number) if block not in dropped]
        shallower = replace(architecture, dense=with_blocks(architecture.dense, kept))
        return self, replace(ModelSpec.dense(shallower, spec.dtype), notes=spec.notes)

    def apply(self, depth: Depth) -> None:
        """Choose the blocks greedily; candidates are those of least measured rise, and the next by similarity."""
        similarity = depth.similarities()
        waiting = sorted(range(depth.num_blocks), key=lambda block: -similarity[block])
        rises, reached = dict[int, float](), 0.0
        while len(depth.dropped) < depth.wanted:
            tried = sorted(rises, key=rises.__getitem__)[: THEN_TRIED - 1]
            fresh = THEN_TRIED - len(tried) if rises else FIRST_TRIED
            tried, waiting = [*tried, *waiting[:fresh]], waiting[fresh:]
            found = depth.measure([(*depth.dropped, block) for block in tried])
            rises |= {block: value - reached for block, value in zip(tried, found, strict=True)}
            best = min(tried, key=rises.__getitem__)
            reached += rises.pop(best)
            depth.dropped, depth.divergences = (*depth.dropped, best), (*depth.divergences, reached)
