"""The linears of a checkpoint as they are stored: which tensors make one up, what it comes to, how sparse it is.

Dimensions: a linear has m outputs and n inputs.
"""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from compress.checkpoints.metadata import LinearMetadata
from compress.errors import CheckpointError
from compress.models.storage import Form, Linear, num_parameters
from compress.models.storage import linears_of as modules_of
from compress.models.tensor_files import BITS, StoredTensor, open_tensors
from compress.numerics.sparsity import Pattern
from compress.own_model.modeling_compress import AdaptedLinear, LowRankLinear, PivotLinear

BLOCK = re.compile(r"\.(\d+)\.(.*)")  # its number, and what is below it
Weight = nn.Linear | AdaptedLinear
FLOATS = ("F64", "F32", "F16", "BF16")
NUMBERS_AT_ONCE = 2**22  # read while zeros are counted
TWO_OF_FOUR = Pattern(2, 4)  # what is looked for where nothing is promised


@dataclass(frozen=True)
class StoredLinear:
    """
    path: in the model as it is written. module: on the meta device. tensors: by their names below the path.
    metadata: what compress.json says of it.
    """

    path: str
    module: Linear
    tensors: Mapping[str, StoredTensor]
    metadata: LinearMetadata | None = None

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
    def form(self) -> Form:
        return Form.of(self.module)

    @property
    def rank(self) -> int | None:
        """Of the factors, multiplied out or not, or of the adapter; None without either."""
        multiplied_out = self.metadata.rank if self.metadata and self.metadata.form else None
        return self.form.rank or multiplied_out

    @property
    def bits(self) -> int:
        """Of a number of the weight; of the factors' where it is a product."""
        if self.form.bits is not None:
            return self.form.bits
        _, tensors = self.weights[0]
        return BITS[next(each.dtype for name, each in tensors.items() if name in ("weight", "weight.values"))]

    @property
    def is_product(self) -> bool:
        return isinstance(self.module, LowRankLinear | PivotLinear)

    @property
    def weights(self) -> "list[tuple[Weight, dict[str, StoredTensor]]]":
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
    model: nn.Module, tensors: Mapping[str, StoredTensor], metadata: Iterable[LinearMetadata]
) -> list[StoredLinear]:
    """
    model: on the meta device. tensors: by their names in it.
    """
    told = {each.linear: each for each in metadata}
    modules = dict(modules_of(model))
    below: dict[str, dict[str, StoredTensor]] = {path: {} for path in modules}
    for name, tensor in tensors.items():
        path = next((path for path in prefixes(name) if path in below), None)
        if path is not None:
            below[path][name.removeprefix(f"{path}.")] = tensor
    return [StoredLinear(path, module, below[path], told.get(path)) for path, module in modules.items() if below[path]]


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


# How sparse the stored weights are: counted, whatever was promised.


@dataclass(frozen=True)
class Zeros:
    """Of a weight without its adapter. pattern: the one that it was pruned to, or 2:4 where that is found.

    kept: whether the pattern holds everywhere.
    """

    count: int
    total: int
    pattern: str | None
    kept: bool

    @property
    def share(self) -> float:
        return self.count / max(self.total, 1)


def zeros_of(linear: StoredLinear) -> Zeros | None:
    """None where a product of two dense ones takes the weight's place. Raises CheckpointError for an odd pattern."""
    weights = [pair for pair in linear.weights if len(linear.weights) == 1 or isinstance(pair[0], AdaptedLinear)]
    if not weights:
        return None
    # A dense weight may have been pruned and its adapter multiplied into it: there nothing is promised.
    promised = linear.metadata.pattern if linear.metadata and isinstance(linear.module, AdaptedLinear) else None
    try:
        pattern = Pattern.parse(promised) if promised else TWO_OF_FOUR
    except ValueError as error:
        raise CheckpointError(f"compress.json is damaged: {error}. Get it again.") from error
    counts, wholes, keep = zip(*(counted(module, tensors, pattern) for module, tensors in weights), strict=True)
    count, total, kept = sum(counts), sum(wholes), all(keep)
    return Zeros(count, total, promised or ("2:4" if kept and count < total else None), kept)


def counted(module: Weight, tensors: Mapping[str, StoredTensor], pattern: Pattern) -> tuple[int, int, bool]:
    """Zeros, all numbers, and whether the pattern holds."""
    m, n = module.out_features, module.in_features
    zeros, kept = 0, not pattern.is_grouped or n % pattern.group == 0
    for rows in weight_rows(module, tensors):
        zeros += int((rows == 0).sum())
        kept = kept and keeps(rows, pattern)
    if not pattern.is_grouped:
        kept = zeros >= int(round((1 - pattern.density) * n, 6)) * m
    return zeros, m * n, kept


def keeps(rows: Shaped[Tensor, "rows n"], pattern: Pattern) -> bool:
    if not pattern.is_grouped:
        return True
    return bool(((rows != 0).unflatten(1, (-1, pattern.group)).sum(-1) <= pattern.keep).all())


def weight_rows(module: Weight, tensors: Mapping[str, StoredTensor]) -> Iterator[Tensor]:
    """(rows, n) of the weight, a stretch after another."""
    m, step = module.out_features, max(1, NUMBERS_AT_ONCE // max(module.in_features, 1))
    if isinstance(module, nn.Linear):
        with open_tensors(tensors["weight"].file) as opened:
            view = opened.get_slice(tensors["weight"].name)
            for start in range(0, m, step):
                yield view[start : start + step]
        return
    stored = copy.deepcopy(module)
    weight = {name: read(tensor) for name, tensor in tensors.items() if name.startswith("weight")}
    stored.load_state_dict(weight, strict=False, assign=True)
    for start in range(0, m, step):
        yield stored.rows(start, min(start + step, m), torch.float32)


def read(tensor: StoredTensor) -> Tensor:
    with open_tensors(tensor.file) as opened:
        found: Tensor = opened.get_tensor(tensor.name)
    return found
