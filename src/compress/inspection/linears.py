"""The linears of a checkpoint as they are stored: which tensors make one up, what it comes to, how sparse it is.

Dimensions: a linear has m outputs and n inputs.
"""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.checkpoints.metadata import LinearMetadata
from compress.errors import CheckpointError
from compress.models.storage import Form, Linear, num_parameters
from compress.models.storage import linears_of as modules_of
from compress.models.tensor_files import BITS, FLOATS, StoredTensor, open_tensors
from compress.numerics.sparsity import Pattern
from compress.own_model.modeling_compress import AdaptedLinear, LowRankLinear, PivotLinear

BLOCK = re.compile(r"\.(\d+)\.(.*)")  # its number, and what is below it
Weight = nn.Linear | AdaptedLinear
NUMBERS_AT_ONCE = 2**22  # read while zeros are counted
TWO_OF_FOUR = Pattern(2, 4)  # what is looked for where nothing is promised


@dataclass(frozen=True)
class Zeros:
    """Of a weight without its adapter. pattern: the one that it was pruned to, or 2:4 where that is found.

    kept: whether the pattern holds everywhere.
    """

    count: int
    total: int
    pattern: str | None
    kept: bool


@dataclass(frozen=True)
class StoredLinear:
    """A linear as it is stored in a checkpoint.

    path: in the model as it is written. module: on the meta device. tensors: by their names below the path.
    metadata: what compress.json says of it. zeros: None where none were counted.
    """

    path: str
    module: Linear
    tensors: Mapping[str, StoredTensor]
    metadata: LinearMetadata | None = None
    zeros: Zeros | None = None

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
        return self.form.rank or (self.metadata.rank if self.metadata and self.metadata.form else None)

    @property
    def lost(self) -> float | None:
        return self.metadata.lost if self.metadata else None

    @property
    def bits(self) -> int:
        """Of a number of the weight; of the factors' where it is a product."""
        _, tensors = self.weights[0]
        floats = (each.dtype for name, each in tensors.items() if name in ("weight", "weight.values"))
        return self.form.bits or BITS[next(floats)]

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

    def to_dict(self) -> dict[str, Any]:
        zeros, form = self.zeros, self.form
        return {
            "linear": self.path,
            "outputs": form.m,
            "inputs": form.n,
            "form": form.kind,
            "rank": self.rank,
            "bits": self.bits,
            "bits_per_weight": bits_per_weight([self]),
            "zeros": None if zeros is None else zeros.count / max(zeros.total, 1),
            "pattern": None if zeros is None else zeros.pattern,
            "pattern_kept": None if zeros is None or zeros.pattern is None else zeros.kept,
            "lost": self.lost,
            "parameters": num_parameters(self.module),
            "bytes": sum(tensor.bytes for tensor in self.tensors.values()),
        }


def block_of(name: str) -> int | None:
    found = BLOCK.search(name)
    return int(found[1]) if found else None


def bits_per_weight(linears: Iterable[StoredLinear]) -> float | None:
    """Of the (m, n) weights that they stand for, everything counted but biases."""
    linears = list(linears)
    weights = sum(linear.form.m * linear.form.n for linear in linears)
    tensors = (tensor for linear in linears for name, tensor in linear.tensors.items() if name != "bias")
    return 8 * sum(tensor.bytes for tensor in tensors) / weights if weights else None


def linears_of(
    model: nn.Module, tensors: Mapping[str, StoredTensor], metadata: Iterable[LinearMetadata]
) -> list[StoredLinear]:
    """Find the linears of a checkpoint. model: on the meta device. tensors: by their names in it."""
    told = {each.linear: each for each in metadata}
    modules = dict(modules_of(model))
    below: dict[str, dict[str, StoredTensor]] = {path: {} for path in modules}
    for name, tensor in tensors.items():
        parts = name.split(".")
        paths = (".".join(parts[:end]) for end in range(1, len(parts)))
        path = next((path for path in paths if path in below), None)
        if path is not None:
            below[path][name.removeprefix(f"{path}.")] = tensor
    return [StoredLinear(path, module, below[path], told.get(path)) for path, module in modules.items() if below[path]]


def foreign_linears(tensors: Mapping[str, StoredTensor]) -> list[StoredLinear]:
    """Of a model that nothing is known of but its tensors: the matrices of floats in its blocks."""
    found = []
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        if last == "weight" and len(tensor.shape) == 2 and tensor.dtype in FLOATS and block_of(name) is not None:
            bias = {"bias": tensors[f"{path}.bias"]} if f"{path}.bias" in tensors else {}
            module = nn.Linear(tensor.shape[1], tensor.shape[0], bias=bool(bias), device="meta")
            found.append(StoredLinear(path, module, {"weight": tensor, **bias}))
    return found


# How sparse the stored weights are: counted, whatever was promised.


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
    counts, keep = zip(*(counted(module, tensors, pattern) for module, tensors in weights), strict=True)
    total = sum(module.out_features * module.in_features for module, _ in weights)
    count, kept = sum(counts), all(keep)
    return Zeros(count, total, promised or ("2:4" if kept and count < total else None), kept)


def counted(module: Weight, tensors: Mapping[str, StoredTensor], pattern: Pattern) -> tuple[int, bool]:
    """Zeros, and whether the pattern holds."""
    m, n = module.out_features, module.in_features
    zeros, kept = 0, not pattern.is_grouped or n % pattern.group == 0
    for rows in weight_rows(module, tensors):
        zeros += int((rows == 0).sum())
        if kept and pattern.is_grouped:
            kept = bool(((rows != 0).unflatten(1, (-1, pattern.group)).sum(-1) <= pattern.keep).all())
    if not pattern.is_grouped:
        kept = zeros >= int(round((1 - pattern.density) * n, 6)) * m
    return zeros, kept


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
