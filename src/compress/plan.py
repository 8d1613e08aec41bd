"""What a recipe will do to a model, from its config.json alone: architecture, widths, sizes, memory, disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from compress.budget import Choice, Space, choices, planned_shape
from compress.checkpoints.sizes import Size, dense_size
from compress.checkpoints.sliced import SlicedTarget
from compress.checkpoints.stock import StockTarget
from compress.checkpoints.targets import KERNEL_STEP, Shape, Target, dense_units
from compress.errors import UsageError
from compress.families import Family
from compress.models.decoder import Decoder
from compress.recipe import Recipe
from compress.stages._stage import StageConfig
from compress.streaming.cache import cache_bytes
from compress.streaming.groups import LinearGroup
from compress.streaming.passage import num_streams
from compress.streaming.sites import Count, StreamPoint, WholeModel, stream_points
from compress.streaming.survey import SurveyNeed, kept_streams


@dataclass(frozen=True, kw_only=True)
class Plan:
    """
    stages: as they will be run; with a budget, still open. target: what the result is written as.
    widths: of the stream after the embeddings and after each branch; None where the data decides.
    units: how many of each kind the blocks keep. dense: the model's size. sliced: the result's, None where the data
        or a choice decides.
    choices: what fits under the recipe's budget, to be compared by trial; empty without one.
    notes: what the user should know of it.
    memory_bytes: the most that is held at once beside the interpreter: the largest part at its dense width with its
        float64 copy, its statistics, a batch in flight, and the activation cache as far as it may stay in memory.
    disk_bytes: the output, the state a killed run resumes from, twice while it is replaced, and activations that
        memory does not hold.
    """

    stages: tuple[StageConfig, ...]
    target: Target
    widths: list[int | None]
    units: Mapping[str, Count]
    dense: Size
    sliced: Size | None
    choices: list[Choice]
    notes: list[str]
    memory_bytes: int
    disk_bytes: int

    @property
    def removed(self) -> float | None:
        return None if self.sliced is None else 1 - self.sliced.parameters / self.dense.parameters

    @property
    def survey(self) -> SurveyNeed:
        return max(stage.survey for stage in self.stages)

    def chosen(self, choice: Choice) -> "Plan":
        """The plan with one of its choices made."""
        return replace(
            self,
            stages=tuple(stage.fitted(choice.counts) for stage in self.stages),
            widths=list(choice.shape.widths),
            units=choice.shape.units,
            sliced=choice.size,
            choices=[],
        )

    @property
    def shape(self) -> Shape:
        """The shape of the result, at its dense width where the data decides."""
        return Shape(tuple(width or self.target.dense.hidden_size for width in self.widths), self.units)

    def to_dict(self) -> dict[str, Any]:
        open_widths = bool(self.choices)
        return {
            "architecture": self.target.architecture,
            "loads_without_our_code": self.target.is_stock,
            "widths": None if open_widths else self.widths,
            "units": None if open_widths else dict(self.units),
            "choices": [{**choice.counts, **vars(choice.size)} for choice in self.choices],
            "dense": vars(self.dense),
            "sliced": None if self.sliced is None else vars(self.sliced),
            "removed": self.removed,
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
            "notes": self.notes,
        }


def model_points(config: Any, family: Family, seed: int) -> list[StreamPoint]:
    names = [branch.name for branch in family.branches]
    blocks, width = config.num_hidden_layers, config.hidden_size
    return stream_points(width, num_blocks=blocks, branch_names=names, seed=seed)


def choose_target(recipe: Recipe, config: Any, family: Family) -> tuple[Target, list[str]]:
    """What the result is written as, and what of that is to be told."""
    shared = any(stage.site is WholeModel for stage in recipe.stages)
    if not shared:
        return SlicedTarget(config, family), []
    if recipe.budget is not None and recipe.budget.allocation == "searched":
        return SlicedTarget(config, family, shortcuts=False), [
            "MLPs of different widths have no stock shape, so the result is written in our architecture."
        ]
    if family.stock is None:
        return SlicedTarget(config, family, shortcuts=False), [
            f"{config.model_type} ties the heads' size to the hidden one, so the result is written in our architecture."
        ]
    if reason := family.stock.not_stock(config):
        return SlicedTarget(config, family, shortcuts=False), [f"The result is written in our architecture: {reason}"]
    return StockTarget(config, family), []


def step_notes(target: Target, stages: Sequence[StageConfig]) -> list[str]:
    """That the model is too small for widths that kernels are made for."""
    step = target.steps()["hidden"]
    left_to_us = any("hidden" in (stage.opens, stage.rounds) for stage in stages)
    if not target.is_stock or step % KERNEL_STEP == 0 or not left_to_us:
        return []
    return [
        f"Hidden sizes come in multiples of {step}: multiples of {KERNEL_STEP}, which Marlin kernels and group-wise "
        "quantisation take, would be too coarse for this model."
    ]


def make_plan(
    recipe: Recipe, config: Any, family: Family, *, dtype: torch.dtype, computing: torch.dtype, cache_memory: int
) -> Plan:
    """Raises UsageError with what of the recipe does not fit the model."""
    points, units = model_points(config, family, recipe.seed), dense_units(config, family)
    target, notes = choose_target(recipe, config, family)
    stages = tuple(stage.resolved(target.steps()) for stage in recipe.stages)
    report([fault for stage in stages for fault in stage.faults(points, units)])
    dense = dense_size(config, dtype)
    widths, kept = planned_shape(stages, points, units)
    known = [width for width in widths if width is not None]
    space, found = Space(stages, points, units, target, dtype), list[Choice]()
    sliced: Size | None = None
    if recipe.budget is not None:
        found = choices(space, recipe.budget, dense)
        if deletes_nothing(found[0].shape, points, units):
            raise UsageError("The budget deletes nothing: the whole model fits under it. Allow less.")
    elif len(known) == len(widths):
        shape = Shape(tuple(known), kept)
        report(target.faults(shape))
        if deletes_nothing(shape, points, units):
            raise UsageError("The recipe deletes nothing: every width stays as it is. Add a slice stage.")
        sliced = space.full_size(shape)
    largest = sliced or max((choice.size for choice in found), key=lambda size: size.bytes, default=dense)
    memory, disk = needs(recipe, stages, config, family, computing=computing, cache_memory=cache_memory)
    plan = Plan(
        stages=stages,
        target=target,
        widths=widths,
        units=kept,
        dense=dense,
        sliced=sliced,
        choices=found,
        notes=notes + step_notes(target, recipe.stages),
        memory_bytes=memory,
        disk_bytes=largest.bytes + disk,
    )
    decided = len(found) == 1 and recipe.budget is not None and recipe.budget.allocation == "uniform"
    return plan.chosen(found[0]) if decided else plan


def deletes_nothing(shape: Shape, points: Sequence[StreamPoint], units: Mapping[str, int]) -> bool:
    return all(width == points[0].dense_width for width in shape.widths) and shape.units == units


def report(faults: Sequence[str]) -> None:
    if faults:
        raise UsageError("\n".join(dict.fromkeys(faults)))


def needs(
    recipe: Recipe,
    stages: Sequence[StageConfig],
    config: Any,
    family: Family,
    *,
    computing: torch.dtype,
    cache_memory: int,
) -> tuple[int, int]:
    """Bytes of memory, and of disk beside the output."""
    calibration, width = recipe.calibration, config.hidden_size
    one = cache_bytes(calibration.samples, calibration.seq_len, width, computing)
    caches = one * num_streams(stages)
    if max(stage.survey for stage in stages) is SurveyNeed.GRADIENT:
        caches = max(caches, one * kept_streams(config.num_hidden_layers, one, cache_memory))
    # Eigenvectors and their like take four matrices of the stream's width; a group of linears has its equations twice.
    statistics = 4 * width**2
    if any(issubclass(stage.site, LinearGroup) for stage in stages):
        inputs = width + max(dense_units(config, family).get("neurons", 0), width)
        statistics = max(statistics, 4 * inputs * (inputs + width))
    memory = largest_part(config, family) * (computing.itemsize + 8) + statistics * 8 + min(caches, cache_memory)
    spilled = caches if caches > cache_memory else 0
    return memory, 2 * one * num_streams(stages) + spilled


def largest_part(config: Any, family: Family) -> int:
    """Parameters of the largest of embeddings, block and head, before compression."""
    decoder = Decoder(config, family, dtype=torch.float32, device=torch.device("cpu"))
    shapes = decoder.parameter_shapes()
    parts = [decoder.embedding_names(), decoder.block_names(0), decoder.head_names()]
    return max(sum(shapes[name].numel() for name in part) for part in parts)
