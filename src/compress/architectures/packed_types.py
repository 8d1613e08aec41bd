"""Which integers of compressed-tensors' `pack-quantized` each engine runs, and which linears it has to store alike.

vLLM multiplies 4 and 8 bits by Marlin, with a scale for 32, 64 or 128 inputs or for a channel; on CPUs 4 bits alone
(its kernels/linear/mixed_precision). Of linears that read the same inputs in one module it makes one: q, k and v; gate
and up. transformers unpacks every linear by its own type when a model is first used; while it loads one, by one type.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

from compress.architectures.architecture import ModelSpec
from compress.models import packing
from compress.models.storage import WORD
from compress.numerics.grids import QuantizationArgs

Engine = Literal["vllm", "transformers"]
GROUPS = (32, 64, 128, None)  # inputs that share a scale; None for all of a channel
ENGINES: dict[Engine, dict[int, tuple[int | None, ...]]] = {  # by bits
    "vllm": dict.fromkeys((4, 8), GROUPS),
    "transformers": dict.fromkeys((2, 3, 4, 5, 6, 8), GROUPS),
}


def candidates(engine: Engine, inputs: int) -> tuple[str, ...]:
    """The types in which an engine runs a linear of so many inputs; vLLM wants rows of whole words."""
    return tuple(
        QuantizationArgs(num_bits=bits, group_size=size).name
        for bits, sizes in ENGINES[engine].items()
        for size in sizes
        if (size is None or inputs % size == 0) and (engine != "vllm" or bits * inputs % WORD == 0)
    )


def fused(spec: ModelSpec) -> Iterator[tuple[str, ...]]:
    """The paths of linears of which vLLM makes one."""
    family = spec.architecture.family
    for block in range(spec.num_blocks):
        for branch in family.branches_of(block):
            for names in branch.readers_by_norm().values():
                modules = dict[str, list[str]]()
                for name in names:
                    modules.setdefault(name.rpartition(".")[0], []).append(f"{family.blocks}.{block}.{name}")
                yield from (tuple(paths) for module, paths in modules.items() if module and len(paths) > 1)


def torn(spec: ModelSpec, stored: Mapping[str, object]) -> str | None:
    """Say which linears of one are not stored alike; None where all are. stored: how each is, by path."""
    pairs = ((paths[0], path) for paths in fused(spec) for path in paths)
    unlike = next((pair for pair in pairs if stored.get(pair[0]) != stored.get(pair[1])), None)
    return unlike and f"it makes one linear of {unlike[0]} and {unlike[1]}, which are stored in different ways"


def not_for_vllm(spec: ModelSpec) -> str | None:
    """Why vLLM cannot run a model's packed linears; None where it can."""
    packed = {path: each for path, each in spec.storage.items() if each.form == "packed"}
    largest = max((each.rank for each in packed.values()), default=0)
    reasons = (packing.not_for_vllm(each, largest) for each in dict.fromkeys(packed.values()))
    return next(filter(None, reasons), None) or torn(spec, {path: each.scheme for path, each in packed.items()})


def misfits(engine: Engine | None, types: Mapping[str, str], spec: ModelSpec) -> list[str]:
    """What of types by path transformers does not read, or the engine does not run."""
    model_type = spec.architecture.dense.model_type
    if model_type in packing.MADE_ANEW:
        return [f"transformers unpacks a {model_type} while it loads it, all linears by one type. Take --bits."]
    if engine is None:
        return []
    inputs = {linear.path: linear.n for linear in spec.written_linears}
    faults = [
        f"{engine} does not run {path}, of {inputs[path]} inputs, in {name}. Take another type."
        for path, name in types.items()
        if name not in candidates(engine, inputs[path])
    ]
    reason = torn(spec, types) if engine == "vllm" else None
    return [*faults[:3], *([f"vLLM cannot serve this: {reason}. Give them one type."] if reason else [])]
