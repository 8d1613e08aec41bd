"""What a recipe's stages will store linears as, before anything is read, and what else would take as many bytes."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from torch import nn

from compress.architectures.architecture import Architecture, Shape
from compress.architectures.own import as_own
from compress.architectures.packed import not_for_vllm
from compress.checkpoints.sizes import size_of
from compress.errors import report
from compress.factoring import FactorPlan
from compress.models.expert_names import fused_piece
from compress.models.storage import Storage, empty_linear
from compress.recipe import Recipe
from compress.stages._stage import FactorisingStage, StageConfig, StoringStage
from compress.streaming.linears import LinearShape, LinearSite, linear_shape


@dataclass(frozen=True)
class Alternative:
    """Another way to store the same linears.

    bits_per_weight: of these linears, scales, places and adapters counted. bytes: of the whole model.
    """

    name: str
    bits_per_weight: float
    bytes: int


@dataclass(frozen=True)
class StoragePlan:
    """
    stages: all of the recipe's, those that store with what goes by the model said. target: what holds the result.
    storage: of the linears, by path. alternatives: the plan itself first.
    """

    stages: tuple[StageConfig, ...]
    target: Architecture
    storage: Mapping[str, Storage] = field(default_factory=dict)
    alternatives: Sequence[Alternative] = ()
    notes: list[str] = field(default_factory=list)


def storing(stages: Sequence[StageConfig]) -> list[StoringStage]:
    return [stage for stage in stages if isinstance(stage, StoringStage)]


def plan_storage(planned: FactorPlan, shape: Shape, dtype: torch.dtype) -> StoragePlan:
    """
    planned, shape: what the model would be otherwise. Raises UsageError with what does not fit.
    """
    stages, base = planned.stages, planned.target
    (own,) = storing(stages)
    linears = written_linears(base, shape)
    report(own.linear_faults(linears) + packing_faults(own, linears))
    settled = own.settled(linears, dtype)
    stages = tuple(settled if stage is own else stage for stage in stages)
    storage = settled.planned_storage(linears)
    if not storage:
        return StoragePlan(stages, base)
    target = as_own(base) if settled.form == "compact" else base
    found = alternatives(base, shape, {linear.path: linear for linear in linears}, storage, dtype)
    return StoragePlan(stages, target, storage, found, storage_notes(settled, storage))


def packing_faults(stage: StoringStage, linears: Sequence[LinearShape]) -> list[str]:
    """That stock code would not read back what is packed."""
    if stage.form != "packed" or not any(fused_piece(linear.path) for linear in linears):
        return []
    return [
        "A model with experts cannot be packed: transformers fuses them while it loads, looks for the packed parts of "
        "all, and has no linears for an adapter. Store it with --compact, or merge it with --materialize."
    ]


def written_linears(base: Architecture, shape: Shape) -> list[LinearShape]:
    """The linears of the blocks as they would be written, those of factors apart."""
    model, family, found = base.model(shape), base.family, []
    for index, branch in product(range(base.dense.num_hidden_layers), family.branches):
        for name in (*branch.readers, *branch.writers):
            path = f"{family.blocks}.{index}.{name}"
            module, part = model.get_submodule(path), family.part_of(name)
            below = {"": module} if isinstance(module, nn.Linear) else dict(module.named_children())
            for suffix, linear in below.items():
                assert isinstance(linear, nn.Linear)
                ending = f".{suffix}" if suffix else ""
                found.append(linear_shape(path + ending, name + ending, part, linear))
    return found


def mixture_faults(recipe: Recipe) -> list[str]:
    """What cannot be in one recipe with what stores linears."""
    names = [stage.stage for stage in recipe.stages]
    own = storing(recipe.stages)
    name, faults = own[0].stage, list[str]()
    if len(own) > 1:
        faults.append(f"{name} is there twice. Give one stage all of it.")
    late = [stage.stage for stage in recipe.stages[recipe.stages.index(own[0]) + 1 :] if stage.site is LinearSite]
    if late and len(own) == 1:
        faults.append(f"{name} stores linears for good, so {late[0]} has to come before it.")
    if "prune_units" in names:
        faults.append(
            f"prune_units deletes rows of what {name} has stored by then. Run it first, and {name} on its output."
        )
    if recipe.budget is not None or any(stage.opens or open_ranks(stage) for stage in recipe.stages):
        faults.append(
            f"{name} has to know every width and rank beforehand, so a budget or ranks left open are not for this "
            "recipe. Say how much each stage keeps, or run two recipes."
        )
    return faults


def open_ranks(stage: StageConfig) -> bool:
    return isinstance(stage, FactorisingStage) and stage.open_ranks


def bits_per_weight(linears: Mapping[str, LinearShape], storage: Mapping[str, Storage], dtype: torch.dtype) -> float:
    """Of the linears that are stored, everything counted but biases."""
    shapes = Counter((stored, linears[path].m, linears[path].n) for path, stored in storage.items())
    bits = sum(count * 8 * stored_bytes(stored, m, n, dtype) for (stored, m, n), count in shapes.items())
    return bits / sum(count * m * n for (_, m, n), count in shapes.items())


def stored_bytes(stored: Storage, m: int, n: int, dtype: torch.dtype) -> int:
    with torch.device("meta"):
        return size_of(empty_linear(stored, n, m, bias=False, dtype=dtype), dtype).bytes


def alternatives(
    base: Architecture,
    shape: Shape,
    linears: Mapping[str, LinearShape],
    storage: Mapping[str, Storage],
    dtype: torch.dtype,
) -> list[Alternative]:
    """The plan, and what stores all weights, none pruned: the largest two that are no larger, and the next."""
    weights = sum(linears[path].m * linears[path].n for path in storage)
    dense_bytes = size_of(base.model(shape), dtype).bytes
    elsewhere = dense_bytes - weights * dtype.itemsize

    def alternative(name: str, stored: Mapping[str, Storage]) -> Alternative:
        bits = bits_per_weight(linears, stored, dtype)
        return Alternative(name, bits, elsewhere + round(bits * weights / 8))

    found = [alternative("this plan", storage)]
    if next(iter(storage.values())).pattern is None:
        return found
    unpruned = [
        alternative(name, {path: unpruned_storage(stored, bits, adapted=adapted) for path, stored in storage.items()})
        for adapted, name_of in ((True, "{} bits, unpruned, the same adapter"), (False, "{} bits, unpruned"))
        for bits in range(2, 9)
        for name in [name_of.format(bits)]
    ]
    fitting = [each for each in unpruned if each.bytes <= found[0].bytes]
    larger = [each for each in unpruned if each.bytes > found[0].bytes]
    best = sorted(fitting, key=lambda each: each.bytes)[-2:]
    return [*found, *best, *sorted(larger, key=lambda each: each.bytes)[:1]]


def unpruned_storage(stored: Storage, bits: int, *, adapted: bool) -> Storage:
    """The same in so many bits without a pattern, with its adapter or without one."""
    plain = Storage(form=stored.form, bits=bits, group=stored.group)
    if not adapted:
        return plain
    return replace(plain, rank=stored.rank, adapter_bits=stored.adapter_bits, adapter_group=stored.adapter_group)


def storage_notes(stage: StoringStage, storage: Mapping[str, Storage]) -> list[str]:
    if stage.form != "packed":
        return []
    first = next(iter(storage.values()))
    reason = not_for_vllm(first, max(each.rank for each in storage.values()))
    notes = [] if reason is None else [f"vLLM cannot serve this: {reason}. transformers and compress.load run it."]
    if first.pattern is not None and first.bits is not None:
        notes.append(
            "Packed for engines, pruned weights are stored as zeros: 2:4 takes as many bytes as unpruned and no engine "
            "runs it faster any more. --compact stores them small; unpruned is better at these bytes."
        )
    return notes
