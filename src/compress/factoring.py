"""What a recipe's factorising stages will do to the linears, before anything is read."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from compress.architectures.architecture import Architecture, Shape, block_linears
from compress.architectures.own import as_own
from compress.checkpoints.sizes import Size
from compress.errors import report
from compress.ranks import RankSpace, check_budget
from compress.recipe import Recipe
from compress.stages._stage import FactorisingStage, StageConfig
from compress.streaming.linears import FactorShape, LinearShape


@dataclass(frozen=True)
class FactorPlan:
    """
    stages: all of the recipe's, those that factorise with what they will do to each linear. target: what holds that.
    factors: what linears become, by path. ranks: what ranks are to be found for, where a stage leaves them open.
    """

    stages: tuple[StageConfig, ...]
    target: Architecture
    factors: Mapping[str, FactorShape] = field(default_factory=dict)
    ranks: RankSpace | None = None
    notes: list[str] = field(default_factory=list)


def factorising(stages: Sequence[StageConfig]) -> list[FactorisingStage]:
    return [stage for stage in stages if isinstance(stage, FactorisingStage)]


def plan_factors(
    recipe: Recipe,
    stages: tuple[StageConfig, ...],
    base: Architecture,
    shape: Shape | None,
    dtype: torch.dtype,
    dense: Size,
) -> FactorPlan:
    """
    base, shape: what the model would be without factors; no shape where widths are not known yet.
    Raises UsageError with what does not fit.
    """
    if shape is None:
        report(["Ranks go by widths that are known beforehand. Give slice and prune_units a ratio."])
        raise AssertionError
    report(base.faults(shape))
    own, linears = factorising(stages), block_linears(base, shape)
    report(linear_faults(own, linears))
    writes_factors = any(stage.writes_factors for stage in own)
    target = as_own(base) if writes_factors else base
    opened = next((stage for stage in own if stage.open_ranks), None)
    if opened is not None:
        space = RankSpace(opened, linears, base, shape, dtype)
        if recipe.budget is not None:
            check_budget(space, recipe.budget, dense)
        return FactorPlan(stages, target, ranks=space)
    settled = tuple(stage.settled(linears) if isinstance(stage, FactorisingStage) else stage for stage in stages)
    factors = {path: f for stage in own for path, f in stage.planned_factors(linears).items()}
    notes = dense_notes(own, linears, factors)
    return FactorPlan(settled, target, factors if writes_factors else {}, notes=notes)


def linear_faults(stages: Sequence[FactorisingStage], linears: Sequence[LinearShape]) -> list[str]:
    faults = [fault for stage in stages for fault in stage.linear_faults(linears)]
    twice = [linear.name for linear in linears if sum(stage.targets(linear) for stage in stages) > 1]
    faults += [f"Two stages would factorise {name}. Give each its own target." for name in twice[:1]]
    if len(stages) > 1 and any(stage.open_ranks for stage in stages):
        faults.append("Ranks can be left open for one factorising stage, and then it has to be the only one.")
    if any(stage.opens and not stage.writes_factors for stage in stages):
        faults.append("Multiplied out, the model keeps its size: a budget cannot be kept. Give --rank-frac or --rank.")
    return faults


def dense_notes(
    stages: Sequence[FactorisingStage], linears: Sequence[LinearShape], factors: Mapping[str, FactorShape]
) -> list[str]:
    targets = [linear for linear in linears if any(stage.targets(linear) for stage in stages)]
    dense = Counter(linear.name for linear in targets if linear.path not in factors)
    if not dense:
        return []
    names = ", ".join(f"{name} ({count} times)" if count > 1 else name for name, count in dense.items())
    return [f"Factors of this rank would be no smaller, so these stay dense: {names}."]
