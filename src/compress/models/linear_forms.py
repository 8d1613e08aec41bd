"""How the linears of a model are stored: dense, as a product of two, packed, compact, with an adapter."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from compress.models.int4 import Int4Linear
from compress.models.packed import ByteLinear, FloatLinear, LoraLinear, PackedLinear
from compress.models.storage import BlockLinear
from compress.own_model.modeling_compress import AdaptedLinear, CompactLinear, LowRankLinear, PivotLinear

Linear = nn.Linear | LowRankLinear | PivotLinear | AdaptedLinear
KINDS = {  # `kernel`: packed, and multiplied as it is
    nn.Linear: "dense",
    LowRankLinear: "factors",
    PivotLinear: "pivot",
    CompactLinear: "compact",
    Int4Linear: "kernel",
    PackedLinear: "packed",
    ByteLinear: "bytes",
    FloatLinear: "adapted",
    BlockLinear: "blocks",
}


@dataclass(frozen=True)
class Form:
    """How a linear is stored: n inputs, m outputs.

    bits: of a weight's code; None for floats. pattern: which weights are kept, where only these are stored.
    rank: of the factors, or of the adapter.
    """

    kind: str
    m: int
    n: int
    bits: int | None = None
    pattern: str | None = None
    rank: int = 0

    @classmethod
    def of(cls, linear: Any) -> "Form":
        kind, m, n = KINDS.get(type(linear), "dense"), linear.out_features, linear.in_features
        if isinstance(linear, LowRankLinear | PivotLinear):
            factor = cls.of(linear.first)
            kind += "" if factor.kind == "dense" else f", {factor.kind}"
            return cls(kind, m, n, factor.bits, factor.pattern, linear.rank)
        if isinstance(linear, CompactLinear):
            weight = linear.weight
            pattern = f"{weight.keep}:{weight.group}" if weight.keep < weight.group else None
            return cls(kind, m, n, weight.bits, pattern, 0 if linear.first is None else linear.first.num_rows)
        if isinstance(linear, LoraLinear):
            return cls(kind, m, n, code_bits(linear), rank=0 if linear.lora_A is None else len(linear.lora_A))
        return cls(kind, m, n)


def code_bits(linear: LoraLinear) -> int | None:
    if isinstance(linear, PackedLinear):
        return linear.bits
    return {Int4Linear: 4, ByteLinear: 8}.get(type(linear))


def linears_of(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """Path and module of each linear; of one that consists of linears, the whole."""
    whole: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if isinstance(module, Linear) and not path.startswith(whole):
            whole = (*whole, f"{path}.")
            yield path, module
