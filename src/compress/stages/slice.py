"""Deleting the stream's least principal directions (SliceGPT, arXiv 2401.15024, section 3.4).

How many are kept is a share of the hidden size (`ratio` says what is deleted: one number, or one for each block, or a
line from the first block to the last), a `width`, or what holds a share of the energy (`explained_variance`, the
paper's table 6); with none of these the recipe's budget decides. Widths are rounded down to a multiple of `round_to`,
by default what suits the architecture. The last block's output and the head keep the full width unless `slice_head`,
as in the paper's code: the head reads what no later block could correct.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from compress.architectures.architecture import KERNEL_STEP, ModelSpec
from compress.calibration.sites import Count, StreamPoint
from compress.errors import report
from compress.numerics.frames import width_for_energy
from compress.stages._stage import StageConfig

Ratio = Annotated[float, Field(gt=0, lt=1)]
RULES = ("ratio", "block_ratios", "linear_ratios", "explained_variance", "width")


class Slice(StageConfig):
    site: ClassVar = StreamPoint
    reshapes: ClassVar = True
    after: ClassVar = ("rotate or rotate_shared",)
    stage: Literal["slice"] = "slice"
    ratio: Ratio | None = None
    block_ratios: tuple[Annotated[float, Field(ge=0, lt=1)], ...] | None = None
    linear_ratios: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] | None = None
    explained_variance: Annotated[float, Field(gt=0, le=1)] | None = None
    width: Annotated[int, Field(ge=1)] | None = None
    round_to: Annotated[int, Field(ge=1)] | None = None
    slice_head: bool = False

    @model_validator(mode="after")
    def _one_rule(self) -> "Slice":
        given = [rule for rule in RULES if getattr(self, rule) is not None]
        if len(given) > 1:
            raise ValueError(f"slice takes one of {', '.join(RULES)}; got {', '.join(given)}")
        return self

    @property
    def opens(self) -> str | None:
        return None if any(getattr(self, rule) is not None for rule in RULES) else "hidden"

    @property
    def step(self) -> int:
        return self.round_to or 1

    def decided(self, choice: Mapping[str, Count]) -> "Slice":
        return self.model_copy(update={"width": choice["hidden"]}) if self.opens else self

    def plan(self, spec: ModelSpec) -> tuple["Slice", ModelSpec]:
        stage = self
        if self.round_to is None and self.width is None:
            step = spec.architecture.steps()["hidden"]
            stage = self.model_copy(update={"round_to": step})
            spec = replace(spec, notes=(*spec.notes, *step_notes(step, is_stock=spec.architecture.is_stock)))
        report(stage.problems(spec.points))
        if stage.opens:
            return stage, replace(spec, undecided=spec.undecided | {"hidden"})
        widths = (stage.planned_width(point) for point in spec.points)
        narrowed = (
            None if before is None or width is None else min(before, width)
            for before, width in zip(spec.widths, widths, strict=True)
        )
        return stage, replace(spec, widths=tuple(narrowed))

    def apply(self, point: StreamPoint) -> None:
        if point.basis is None:
            raise ValueError(f"{point.name} has no basis to slice: rotate comes first.")
        width = self.planned_width(point)
        if width is None:
            assert self.explained_variance is not None
            width = self.rounded(width_for_energy(point.basis.frame.energy, self.explained_variance), point.dense_width)
        point.basis.width = width

    def planned_width(self, point: StreamPoint) -> int | None:
        """The width that it gives the stream at a point; None if the data decides."""
        if (point.is_last and not self.slice_head) or self.opens:
            return point.dense_width
        if self.width is not None:
            return self.width
        ratio = self.ratio_at(point)
        return None if ratio is None else self.rounded(int((1 - ratio) * point.dense_width), point.dense_width)

    def ratio_at(self, point: StreamPoint) -> float | None:
        if self.linear_ratios is not None:
            first, last = self.linear_ratios
            return first + (last - first) * point.block / max(1, point.num_blocks - 1)
        return self.block_ratios[point.block] if self.block_ratios is not None else self.ratio

    def rounded(self, width: int, dense_width: int) -> int:
        """Down to a multiple of `round_to`, but at least one of them; the full width is left as it is."""
        return width if width == dense_width else max(width - width % self.step, self.step)

    def problems(self, points: Sequence[StreamPoint]) -> list[str]:
        """What does not fit a model whose stream has these points."""
        problems = []
        num_blocks, dense_width = points[0].num_blocks, points[0].dense_width
        if self.block_ratios is not None and len(self.block_ratios) != num_blocks:
            return [f"{len(self.block_ratios)} ratios are given for {num_blocks} blocks. Give one for each block."]
        ratios = [ratio for ratio in map(self.ratio_at, points) if ratio is not None]
        if self.width is not None and self.width > dense_width:
            problems.append(f"The width {self.width} is more than the model's hidden size of {dense_width}. Use less.")
        if ratios and int((1 - max(ratios)) * dense_width) < self.step:
            problems.append(
                f"The ratio {max(ratios)} leaves less than {self.round_to} of {dense_width} dimensions (widths are "
                f"multiples of {self.round_to}). Use a smaller ratio or --round-to."
            )
        if ratios and all(self.planned_width(point) == dense_width for point in points):
            problems.append(f"The ratio {max(ratios)} deletes nothing of {dense_width} dimensions. Use a larger one.")
        return problems


def step_notes(step: int, *, is_stock: bool) -> list[str]:
    """Say where a stock model is too small for the widths that kernels are made for."""
    if not is_stock or step % KERNEL_STEP == 0:
        return []
    return [
        f"Hidden sizes come in multiples of {step}: multiples of {KERNEL_STEP}, which Marlin kernels and group-wise "
        "quantization take, would be too coarse for this model."
    ]
