"""What a recipe's stages will store linears as, before anything is read, and what else would take as many bytes."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from compress.checkpoints.sizes import size_of
from compress.checkpoints.stored import CompactTarget, PackedTarget, not_for_vllm
from compress.checkpoints.targets import Shape, Target, block_linears
from compress.errors import report
from compress.families import Family
from compress.models.storage import Storage, empty_linear
from compress.stages._stage import StageConfig, StoringStage
from compress.streaming.linears import LinearShape


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
    target: Target
    storage: Mapping[str, Storage] = field(default_factory=dict)
    alternatives: Sequence[Alternative] = ()
    notes: list[str] = field(default_factory=list)


def storing(stages: Sequence[StageConfig]) -> list[StoringStage]:
    return [stage for stage in stages if isinstance(stage, StoringStage)]


def plan_storage(
    stages: tuple[StageConfig, ...], base: Target, shape: Shape, family: Family, dtype: torch.dtype
) -> StoragePlan:
    """Raises UsageError with what does not fit."""
    (own,) = storing(stages)
    linears = block_linears(base, shape, family)
    report(own.linear_faults(linears))
    settled = own.settled(linears, dtype)
    stages = tuple(settled if stage is own else stage for stage in stages)
    storage = settled.planned_storage(linears)
    if not storage:
        return StoragePlan(stages, base)
    target: Target = CompactTarget(base) if settled.form == "compact" else PackedTarget(base)
    found = alternatives(base, shape, {linear.path: linear for linear in linears}, storage, dtype)
    return StoragePlan(stages, target, storage, found, storage_notes(settled, storage))


def mixture_faults(stages: Sequence[StageConfig]) -> list[str]:
    own = storing(stages)
    others = [stage.stage for stage in stages if stage.reshapes or stage.stage == "factorize"]
    faults = [f"{own[0].stage} is there twice. Give one stage all of it."] if len(own) > 1 else []
    if others:
        faults.append(
            f"{own[0].stage} works on a model as it is, so {others[0]} cannot be in the same recipe. "
            f"Compress by {others[0]} first and give its output to {own[0].stage}, where that is a stock model."
        )
    return faults


def bits_per_weight(linears: Mapping[str, LinearShape], storage: Mapping[str, Storage], dtype: torch.dtype) -> float:
    """Of the linears that are stored, everything counted but biases."""
    shapes = Counter((stored, linears[path].m, linears[path].n) for path, stored in storage.items())
    bits = sum(count * 8 * stored_bytes(stored, m, n, dtype) for (stored, m, n), count in shapes.items())
    return bits / sum(count * m * n for (_, m, n), count in shapes.items())


def stored_bytes(stored: Storage, m: int, n: int, dtype: torch.dtype) -> int:
    with torch.device("meta"):
        return size_of(empty_linear(stored, n, m, bias=False, dtype=dtype), dtype).bytes


def alternatives(
    base: Target,
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
