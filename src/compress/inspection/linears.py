"""The linears of a checkpoint as they are stored: which tensors make one up, and what it comes to.

Dimensions: a linear has m outputs and n inputs.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from compress.checkpoints.facts import LinearFacts
from compress.models.counting import num_parameters
from compress.models.packed import ByteLinear, FloatLinear, LoraLinear, PackedLinear
from compress.models.tensor_files import BITS, StoredTensor
from compress.own_model.modeling_compress import AdaptedLinear, CompactLinear, LowRankLinear, PivotLinear

BLOCK = re.compile(r"\.(\d+)\.(.*)")  # its number, and what is below it
Kind = nn.Linear | LowRankLinear | PivotLinear | AdaptedLinear
FORMS: tuple[tuple[type[nn.Module], str], ...] = (
    (LowRankLinear, "factors"),
    (PivotLinear, "pivot"),
    (CompactLinear, "compact"),
    (PackedLinear, "packed"),
    (ByteLinear, "bytes"),
    (FloatLinear, "adapted"),
    (nn.Linear, "dense"),
)
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredLinear:
    """
    path: in the model as it is written. module: on the meta device. tensors: by their names below the path.
    facts: what compress.json says of it.
    """

    path: str
    module: Kind
    tensors: Mapping[str, StoredTensor]
    facts: LinearFacts | None = None

    @property
    def m(self) -> int:
        return int(self.module.out_features)

    @property
    def n(self) -> int:
        return int(self.module.in_features)

    @property
    def block(self) -> int | None:
        return block_of(self.path)

    @property
    def name(self) -> str:
        found = BLOCK.search(self.path)
        return found[2] if found else self.path

    @property
    def form(self) -> str:
        return next(form for kind, form in FORMS if isinstance(self.module, kind))

    @property
    def rank(self) -> int | None:
        """Of the factors, multiplied out or not, or of the adapter; None without either."""
        if isinstance(self.module, LowRankLinear | PivotLinear):
            return int(self.module.rank)
        if isinstance(self.module, CompactLinear):
            return None if self.module.first is None else int(self.module.first.num_rows)
        if isinstance(self.module, LoraLinear):
            return None if self.module.lora_A is None else len(self.module.lora_A)
        return self.facts.rank if self.facts and self.facts.form else None

    @property
    def bits(self) -> int:
        """Of a number of the weight; of the factors' where it is a product."""
        module, tensors = self.weights[0]
        if isinstance(module, PackedLinear):
            return module.bits
        if isinstance(module, CompactLinear) and module.weight.bits is not None:
            return int(module.weight.bits)
        weight = next(tensor for name, tensor in tensors.items() if name in ("weight", "weight.values"))
        return BITS[weight.dtype]

    @property
    def weights(self) -> list[tuple[nn.Linear | AdaptedLinear, dict[str, StoredTensor]]]:
        """The modules that hold its weight, two where it is a product, and their tensors by names below them."""
        if not isinstance(self.module, LowRankLinear | PivotLinear):
            return [(self.module, dict(self.tensors))]
        parts = {"first.": self.module.first, "second.": self.module.second}
        return [
            (part, {name.removeprefix(start): each for name, each in self.tensors.items() if name.startswith(start)})
            for start, part in parts.items()
        ]

    @property
    def parameters(self) -> int:
        return num_parameters(self.module)

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Of the (m, n) weight that it stands for, everything counted but its bias."""
        return 8 * sum(tensor.bytes for name, tensor in self.tensors.items() if name != "bias") / (self.m * self.n)


def block_of(name: str) -> int | None:
    found = BLOCK.search(name)
    return int(found[1]) if found else None


def linears_of(
    model: nn.Module, tensors: Mapping[str, StoredTensor], facts: Iterable[LinearFacts]
) -> list[StoredLinear]:
    """
    model: on the meta device. tensors: by their names in it.
    """
    told = {each.linear: each for each in facts}
    modules = dict(outermost(model))
    below: dict[str, dict[str, StoredTensor]] = {path: {} for path in modules}
    for name, tensor in tensors.items():
        path = next((path for path in prefixes(name) if path in below), None)
        if path is not None:
            below[path][name.removeprefix(f"{path}.")] = tensor
    return [StoredLinear(path, module, below[path], told.get(path)) for path, module in modules.items() if below[path]]


def outermost(model: nn.Module) -> Iterable[tuple[str, Kind]]:
    """The linears that are no part of another."""
    seen: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, Kind) and not any(prefix in seen for prefix in prefixes(path)):
            seen.add(path)
            yield path, module


def prefixes(name: str) -> Iterable[str]:
    """The paths that a name lies below."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def foreign_linears(tensors: Mapping[str, StoredTensor]) -> list[StoredLinear]:
    """Of a model that nothing is known of but its tensors: the matrices of floats in its blocks."""
    found = []
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        if last == "weight" and len(tensor.shape) == 2 and tensor.dtype in FLOATS and block_of(name) is not None:
            beside = {"weight": tensor}
            if (bias := tensors.get(f"{path}.bias")) is not None:
                beside["bias"] = bias
            with torch.device("meta"):
                module = nn.Linear(tensor.shape[1], tensor.shape[0], bias=bias is not None)
            found.append(StoredLinear(path, module, beside))
    return found


def linear_names(linears: Iterable[StoredLinear]) -> list[str]:
    """Of the linears in blocks, in the order of a block."""
    return list(dict.fromkeys(linear.name for linear in linears if linear.block is not None))
