"""Compare a plan's storage with other formats for the same linears."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from compress.architectures.architecture import ModelSpec
from compress.architectures.sizes import size_of
from compress.calibration.linears import LinearShape
from compress.models.storage import Storage, empty_linear


@dataclass(frozen=True)
class Alternative:
    """Another way to store the same linears.

    bits_per_weight: of these linears, scales, places and adapters counted. bytes: of the whole model.
    """

    name: str
    bits_per_weight: float
    bytes: int


def alternatives(spec: ModelSpec) -> list[Alternative]:
    """List the plan and unpruned formats: the largest two that are no larger than it, and the next larger one."""
    dense, dtype = replace(spec, storage={}), spec.dtype
    linears = {linear.path: linear for linear in dense.written_linears}
    if spec.is_gguf:
        stored = {path: storage for path, storage in spec.storage.items() if path in linears}
        return [Alternative("this plan", bits_per_weight(linears, stored, dtype), spec.size.bytes)]
    weights = sum(linears[path].m * linears[path].n for path in spec.storage)
    elsewhere = dense.size.bytes - weights * dtype.itemsize

    def alternative(name: str, stored: Mapping[str, Storage]) -> Alternative:
        bits = bits_per_weight(linears, stored, dtype)
        return Alternative(name, bits, elsewhere + round(bits * weights / 8))

    found = [alternative("this plan", spec.storage)]
    if next(iter(spec.storage.values())).pattern is None:
        return found
    unpruned = [
        alternative(
            name, {path: unpruned_storage(stored, bits, adapted=adapted) for path, stored in spec.storage.items()}
        )
        for adapted, name_of in ((True, "{} bits, unpruned, the same adapter"), (False, "{} bits, unpruned"))
        for bits in range(2, 9)
        for name in [name_of.format(bits)]
    ]
    fitting = [each for each in unpruned if each.bytes <= found[0].bytes]
    larger = [each for each in unpruned if each.bytes > found[0].bytes]
    best = sorted(fitting, key=lambda each: each.bytes)[-2:]
    return [*found, *best, *sorted(larger, key=lambda each: each.bytes)[:1]]


def unpruned_storage(stored: Storage, bits: int, *, adapted: bool) -> Storage:
    """The same storage at another number of bits without a sparsity pattern, with or without its adapter."""
    plain = Storage(form=stored.form, bits=bits, group=stored.group)
    if not adapted:
        return plain
    return replace(plain, rank=stored.rank, adapter_bits=stored.adapter_bits, adapter_group=stored.adapter_group)


def bits_per_weight(linears: Mapping[str, LinearShape], storage: Mapping[str, Storage], dtype: torch.dtype) -> float:
    """Bits per weight of the stored linears, everything counted but biases."""
    shapes = Counter((stored, linears[path].m, linears[path].n) for path, stored in storage.items())
    bits = sum(count * 8 * stored_bytes(stored, m, n, dtype) for (stored, m, n), count in shapes.items())
    return bits / sum(count * m * n for (_, m, n), count in shapes.items())


def stored_bytes(stored: Storage, m: int, n: int, dtype: torch.dtype) -> int:
    with torch.device("meta"):
        return size_of(empty_linear(stored, n, m, bias=False, dtype=dtype), dtype).bytes
