"""What a recipe will do to a model, from its config.json alone: architecture, widths, sizes, memory, disk."""

import functools
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from compress.budget import Choice, Space, choices, planned_shape
from compress.checkpoints.dense import DenseTarget
from compress.checkpoints.lowrank import LowRankTarget
from compress.checkpoints.sizes import Size, dense_size, size_of
from compress.checkpoints.sliced import SlicedTarget
from compress.checkpoints.stock import StockTarget
from compress.checkpoints.targets import KERNEL_STEP, Shape, Target, block_linears, dense_units
from compress.errors import UsageError
from compress.families import Family
from compress.models.decoder import Decoder
from compress.ranks import RankSpace, check_budget
from compress.recipe import Recipe
from compress.stages._stage import StageConfig
from compress.streaming.cache import cache_bytes
from compress.streaming.linears import FactorShape, LinearShape
from compress.streaming.passage import has_groups, num_streams
from compress.streaming.sites import Count, StreamPoint, WholeModel, stream_points
from compress.streaming.spectra import WIDEST, LinearWatch
from compress.streaming.survey import SurveyNeed, kept_streams


@dataclass(frozen=True, kw_only=True)
class Plan:
    """
    stages: as they will be run; with a budget, still open. target: what the result is written as.
    widths: of the stream after the embeddings and after each branch; None where the data decides.
    units: how many of each kind the blocks keep. factors: what linears become, by path.
    dense: the model's size. size: the result's, None where the data or a choice decides.
    ranks: what ranks are to be found for, where a stage leaves them open.
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
    factors: Mapping[str, FactorShape]
    dense: Size
    size: Size | None
    ranks: RankSpace | None
    choices: list[Choice]
    notes: list[str]
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
        return next((stage.watch for stage in self.stages if stage.survey & SurveyNeed.LINEARS), None)

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
    def shape(self) -> Shape:
        """The shape of the result, at its dense width where the data decides."""
        widths = tuple(width or self.target.dense.hidden_size for width in self.widths)
        return Shape(widths, self.units, self.factors)

    def to_dict(self) -> dict[str, Any]:
        open_widths = bool(self.choices)
        return {
            "architecture": self.target.architecture,
            "loads_without_our_code": self.target.is_stock,
            "widths": None if open_widths else self.widths,
            "units": None if open_widths else dict(self.units),
            "ranks": None if self.ranks else {path: factors.rank for path, factors in self.factors.items()},
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


def choose_target(recipe: Recipe, config: Any, family: Family) -> tuple[Target, list[str]]:
    """What the result is written as, and what of that is to be told."""
    if not any(stage.reshapes for stage in recipe.stages):
        return DenseTarget(config), []
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
    step = target.steps().get("hidden", KERNEL_STEP)
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
    known = tuple(width for width in widths if width is not None)
    space, found = Space(stages, points, units, target, dtype), list[Choice]()
    size: Size | None = None
    opened = recipe.budget is not None and any(stage.opens in ("hidden", *units) for stage in stages)
    factors, ranks = dict[str, FactorShape](), None
    if any(stage.factorises for stage in stages):
        if opened or len(known) < len(widths):
            report(["Ranks go by widths that are known beforehand. Give slice and prune_units a ratio."])
        base = Shape(known, kept)
        report(target.faults(base))
        linears = block_linears(target, base, family)
        factors, ranks, target, more = plan_factors(stages, linears, target, base, dtype)
        if ranks is None:
            stages = tuple(stage.settled(linears) for stage in stages)
        elif recipe.budget is not None:
            check_budget(ranks, recipe.budget, dense)
        notes = notes + more + token_notes(recipe, stages, config, family)
    if opened and recipe.budget is not None:
        found = choices(space, recipe.budget, dense)
        if deletes_nothing(found[0].shape, points, units):
            raise UsageError("The budget deletes nothing: the whole model fits under it. Allow less.")
    elif len(known) == len(widths) and ranks is None:
        shape = Shape(known, kept, factors)
        report(target.faults(shape))
        if deletes_nothing(shape, points, units) and not any(stage.factorises for stage in stages):
            raise UsageError("The recipe deletes nothing: every width stays as it is. Add a slice stage.")
        size = size_of(target.model(shape), dtype)
    largest = size or max((choice.size for choice in found), key=lambda size: size.bytes, default=dense)
    memory, disk = needs(recipe, stages, config, family, computing=computing, cache_memory=cache_memory)
    plan = Plan(
        stages=stages,
        target=target,
        widths=widths,
        units=kept,
        factors=factors,
        dense=dense,
        size=size,
        ranks=ranks,
        choices=found,
        notes=notes + step_notes(target, recipe.stages),
        memory_bytes=memory,
        disk_bytes=largest.bytes + disk,
    )
    decided = len(found) == 1 and recipe.budget is not None and recipe.budget.allocation == "uniform"
    return plan.chosen(found[0]) if decided else plan


def plan_factors(
    stages: Sequence[StageConfig], linears: Sequence[LinearShape], base: Target, shape: Shape, dtype: torch.dtype
) -> tuple[dict[str, FactorShape], RankSpace | None, Target, list[str]]:
    """What linears become, or what ranks are to be found for; the target that holds them, and what is to be told."""
    report([fault for stage in stages for fault in stage.linear_faults(linears)])
    twice = [linear.name for linear in linears if sum(stage.targets(linear) for stage in stages) > 1]
    report([f"Two stages would factorise {name}. Give each its own target." for name in twice[:1]])
    written = any(stage.writes_factors for stage in stages)
    target: Target = LowRankTarget(base) if written else base
    for stage in stages:
        if stage.open_ranks:
            if not written and stage.opens:
                report(
                    ["Multiplied out, the model keeps its size: a budget cannot be kept. Give --rank-frac or --rank."]
                )
            return {}, RankSpace(stage, linears, base, shape, dtype), target, []
    factors = {path: f for stage in stages for path, f in stage.planned_factors(linears).items()}
    targets = [linear for linear in linears if any(stage.targets(linear) for stage in stages)]
    dense = [linear.name for linear in targets if linear.path not in factors]
    kept = [f"Factors of this rank would be no smaller, so these stay dense: {shown(dense)}."] if dense else []
    return (factors if written else {}), None, target, kept


def shown(names: Sequence[str]) -> str:
    """Each name once, with how often it is there."""
    counts = Counter(names)
    return ", ".join(f"{name} ({count} times)" if count > 1 else name for name, count in counts.items())


def token_notes(recipe: Recipe, stages: Sequence[StageConfig], config: Any, family: Family) -> list[str]:
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
    if SurveyNeed.GRADIENT in surveyed(stages):
        caches = max(caches, one * kept_streams(config.num_hidden_layers, one, cache_memory))
    # Eigenvectors and their like take four matrices of the stream's width; a group of linears has its equations twice.
    statistics = 4 * width**2
    if has_groups(stages):
        # The stream itself is among the inputs of writers where their basis may change.
        beside = width if any(stage.reshapes for stage in stages) else 0
        inputs = beside + max(dense_units(config, family).get("neurons", 0), width)
        statistics = max(statistics, 4 * inputs * (inputs + width))
    memory = largest_part(config, family) * (computing.itemsize + 8) + statistics * 8 + min(caches, cache_memory)
    spilled = caches if caches > cache_memory else 0
    return memory, 2 * one * num_streams(stages) + spilled + gradient_files(stages, config, family)


def surveyed(stages: Sequence[StageConfig]) -> SurveyNeed:
    return functools.reduce(operator.or_, (stage.survey for stage in stages))


def gradient_files(stages: Sequence[StageConfig], config: Any, family: Family) -> int:
    """Bytes of the moments of gradients by linears' outputs, in float32."""
    if SurveyNeed.LINEARS | SurveyNeed.GRADIENT not in surveyed(stages):
        return 0
    decoder = Decoder(config, family, dtype=torch.float32, device=torch.device("cpu"))
    widest, shapes = WIDEST * config.hidden_size, decoder.parameter_shapes()
    outputs = [shapes[name][0] for name in decoder.block_names(0) if len(shapes[name]) > 1]
    return 4 * config.num_hidden_layers * sum(m * m if m <= widest else m for m in outputs)


def largest_part(config: Any, family: Family) -> int:
    """Parameters of the largest of embeddings, block and head, before compression."""
    decoder = Decoder(config, family, dtype=torch.float32, device=torch.device("cpu"))
    shapes = decoder.parameter_shapes()
    parts = [decoder.embedding_names(), decoder.block_names(0), decoder.head_names()]
    return max(sum(shapes[name].numel() for name in part) for part in parts)
