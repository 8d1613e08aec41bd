"""What a recipe will do to a model, from its config.json alone: architecture, widths, sizes, memory, disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from compress.architectures.architecture import KERNEL_STEP, Architecture, Shape, dense_units
from compress.architectures.own import Own
from compress.architectures.stock import Stock
from compress.budget import Choice, Space, choices, planned_shape
from compress.checkpoints.sizes import Size, dense_size, size_of
from compress.errors import UsageError, report
from compress.factoring import FactorPlan, factorising, plan_factors
from compress.families import Family, check_exact
from compress.models.storage import Storage
from compress.needs import Room, needs, surveyed
from compress.ranks import RankSpace
from compress.recipe import Recipe
from compress.stages._stage import StageConfig
from compress.storing import Alternative, StoragePlan, mixture_faults, plan_storage, storing
from compress.streaming.linears import FactorShape, LinearSite
from compress.streaming.sites import Count, StreamPoint, WholeModel, stream_points
from compress.streaming.spectra import LinearWatch
from compress.streaming.survey import SurveyNeed


@dataclass(frozen=True, kw_only=True)
class Plan:
    """
    stages: as they will be run; with a budget, still open. target: what the result is written as.
    widths: of the stream after the embeddings and after each branch; None where the data decides.
    units: how many of each kind the blocks keep. factors, storage: what linears become and are stored as, by path.
    alternatives: other ways to store them, the plan itself first; none where all is as before.
    dense: the model's size. size: the result's, None where the data or a choice decides.
    ranks: what ranks are to be found for, where a stage leaves them open.
    choices: what fits under the recipe's budget, to be compared by trial; empty without one.
    notes: what the user should know of it.
    room: what is held of the calibration text. memory_bytes: the most that is held at once beside the interpreter, as
        `needs.py` has it.
    disk_bytes: the output, the state a killed run resumes from, twice while it is replaced, and activations that
        memory does not hold.
    """

    stages: tuple[StageConfig, ...]
    target: Architecture
    widths: list[int | None]
    units: Mapping[str, Count]
    factors: Mapping[str, FactorShape]
    storage: Mapping[str, Storage]
    alternatives: Sequence[Alternative]
    dense: Size
    size: Size | None
    ranks: RankSpace | None
    choices: list[Choice]
    notes: list[str]
    room: Room
    memory_bytes: int
    disk_bytes: int

    @property
    def removed(self) -> float | None:
        return None if self.size is None else 1 - self.size.parameters / self.dense.parameters

    @property
    def survey(self) -> SurveyNeed:
        return surveyed(self.stages)

    @property
    def watch(self) -> LinearWatch | None:
        """The linears that the survey is to look at."""
        return next((stage.watch for stage in self.stages if SurveyNeed.LINEARS in stage.survey), None)

    @property
    def fewest_units(self) -> dict[str, int]:
        """The smallest count of each kind of unit that the choices have."""
        kinds = [stage.opens for stage in self.stages if stage.opens in self.units]
        return {kind: min(int(choice.counts[kind]) for choice in self.choices) for kind in kinds if kind}

    def chosen(self, choice: Choice) -> "Plan":
        """The plan with one of its choices made."""
        return replace(
            self,
            stages=tuple(stage.fitted(choice.counts) for stage in self.stages),
            widths=list(choice.shape.widths),
            units=choice.shape.units,
            factors=choice.shape.factors,
            ranks=None,
            size=choice.size,
            choices=[],
        )

    @property
    def num_blocks(self) -> int:
        return int(self.target.dense.num_hidden_layers)

    @property
    def shape(self) -> Shape:
        """The shape of the result, at its dense width where the data decides."""
        widths = tuple(width or self.target.dense.hidden_size for width in self.widths)
        return Shape(widths, self.units, self.factors, self.storage)

    def to_dict(self) -> dict[str, Any]:
        open_widths = bool(self.choices)
        return {
            "architecture": self.target.class_name,
            "loads_without_our_code": self.target.is_stock,
            "widths": None if open_widths else self.widths,
            "units": None if open_widths else dict(self.units),
            "ranks": None if self.ranks else {path: factors.rank for path, factors in self.factors.items()},
            "alternatives": [vars(alternative) for alternative in self.alternatives],
            "choices": [{**choice.label, **vars(choice.size)} for choice in self.choices],
            "dense": vars(self.dense),
            "size": None if self.size is None else vars(self.size),
            "removed": self.removed,
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
            "notes": self.notes,
        }


def model_points(config: Any, family: Family, seed: int) -> list[StreamPoint]:
    names = [branch.name for branch in family.branches]
    blocks, width = config.num_hidden_layers, config.hidden_size
    return stream_points(width, num_blocks=blocks, branch_names=names, seed=seed)


def choose_target(recipe: Recipe, config: Any, family: Family) -> tuple[Architecture, list[str]]:
    """What the result is written as, and what of that is to be told.

    Raises UnsupportedModel where the recipe changes the stream of a model that has to keep it.
    """
    if not any(stage.reshapes for stage in recipe.stages):
        return Stock(config, family), []
    check_exact(config, family)
    shared = any(stage.site is WholeModel for stage in recipe.stages)
    if not shared:
        return Own(config, family), []
    if recipe.budget is not None and recipe.budget.allocation == "free":
        return Own(config, family, shortcuts=False), [
            "MLPs of different widths have no stock shape, so the result is written in our architecture."
        ]
    if family.stock is None:
        return Own(config, family, shortcuts=False), [
            f"{config.model_type} ties the heads' size to the hidden one, so the result is written in our architecture."
        ]
    if reason := family.stock.not_stock(config):
        return Own(config, family, shortcuts=False), [f"The result is written in our architecture: {reason}"]
    return Stock(config, family, narrows=True), []


def step_notes(target: Architecture, stages: Sequence[StageConfig]) -> list[str]:
    """That the model is too small for widths that kernels are made for."""
    step = target.steps().get("hidden", KERNEL_STEP)
    left_to_us = any("hidden" in (stage.opens, stage.rounds) for stage in stages)
    if not target.is_stock or step % KERNEL_STEP == 0 or not left_to_us:
        return []
    return [
        f"Hidden sizes come in multiples of {step}: multiples of {KERNEL_STEP}, which Marlin kernels and group-wise "
        "quantisation take, would be too coarse for this model."
    ]


def make_plan(
    recipe: Recipe, config: Any, family: Family, *, dtype: torch.dtype, computing: torch.dtype, room: Room
) -> Plan:
    """Raises UsageError with what of the recipe does not fit the model."""
    points, units = model_points(config, family, recipe.seed), dense_units(config, family)
    base, notes = choose_target(recipe, config, family)
    stages = tuple(stage.resolved(base.steps()) for stage in recipe.stages)
    report([fault for stage in stages for fault in stage.faults(points, units)])
    dense = dense_size(config, dtype)
    widths, kept = planned_shape(stages, points, units)
    known = tuple(width for width in widths if width is not None)
    found = list[Choice]()
    if recipe.budget is not None and any(stage.opens in ("hidden", *units) for stage in stages):
        found = choices(Space(stages, points, units, base, dtype), recipe.budget, dense)
        if deletes_nothing(found[0].shape, points, units):
            raise UsageError("The budget deletes nothing: the whole model fits under it. Allow less.")
    shape = Shape(known, kept) if len(known) == len(widths) and not found else None
    factored, stored = FactorPlan(stages, base), StoragePlan(stages, base)
    if storing(stages):
        report(mixture_faults(recipe))
    if factorising(stages):
        factored = plan_factors(recipe, stages, base, shape, dtype, dense)
    if storing(stages):
        stored = plan_storage(factored, known_shape(shape, base, factored.factors), dtype)
        factored = replace(factored, stages=stored.stages, target=stored.target)
    if storing(stages) or factorising(stages):
        notes = notes + token_notes(recipe, config, family)
    elif shape is not None:
        report(base.faults(shape))
        on_linears = any(stage.site is LinearSite for stage in stages)
        if not on_linears and deletes_nothing(shape, points, units):
            raise UsageError("The recipe deletes nothing: every width stays as it is. Add a slice stage.")
    size = None
    if shape is not None and factored.ranks is None:
        shape = replace(shape, factors=factored.factors, storage=stored.storage)
        size = size_of(factored.target.model(shape), dtype)
    largest = size or max((choice.size for choice in found), key=lambda size: size.bytes, default=dense)
    memory, disk = needs(recipe, stages, config, family, computing=computing, room=room)
    plan = Plan(
        stages=factored.stages,
        target=factored.target,
        widths=widths,
        units=kept,
        factors=factored.factors,
        storage=stored.storage,
        alternatives=stored.alternatives,
        dense=dense,
        size=size,
        ranks=factored.ranks,
        choices=found,
        notes=notes + factored.notes + stored.notes + step_notes(base, recipe.stages),
        room=room,
        memory_bytes=memory,
        disk_bytes=largest.bytes + disk,
    )
    decided = len(found) == 1 and recipe.budget is not None and recipe.budget.allocation == "uniform"
    return plan.chosen(found[0]) if decided else plan


def known_shape(shape: Shape | None, base: Architecture, factors: Mapping[str, FactorShape]) -> Shape:
    """The shape that is to be stored. Raises UsageError where the data decides it."""
    if shape is None:
        raise UsageError("Storage goes by widths that are known beforehand. Give slice a ratio.")
    report(base.faults(shape))
    return replace(shape, factors=factors)


def token_notes(recipe: Recipe, config: Any, family: Family) -> list[str]:
    """That there is less calibration text than the widest linear has inputs."""
    tokens = recipe.calibration.samples * recipe.calibration.seq_len
    widest = max(dense_units(config, family).get("neurons", 0), config.hidden_size)
    if tokens >= 4 * widest:
        return []
    return [
        f"Calibration has {tokens:,} tokens for linears of {widest:,} inputs: expect a poor fit. Use more --samples."
    ]


def deletes_nothing(shape: Shape, points: Sequence[StreamPoint], units: Mapping[str, int]) -> bool:
    return all(width == points[0].dense_width for width in shape.widths) and shape.units == units
