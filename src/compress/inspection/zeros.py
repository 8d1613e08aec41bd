"""How sparse the stored weights are: counted, a linear at a time, whatever was promised."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from compress.errors import CheckpointError
from compress.inspection.linears import StoredLinear
from compress.models.tensor_files import StoredTensor, open_safetensors
from compress.numerics.sparsity import Pattern
from compress.own_model.modeling_compress import AdaptedLinear

BLOCK = 2**22  # numbers at a time
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

    @property
    def share(self) -> float:
        return self.count / max(self.total, 1)


def zeros_of(linear: StoredLinear) -> Zeros | None:
    """None where a product of two dense ones takes the weight's place. Raises CheckpointError for an odd pattern."""
    weights = [pair for pair in linear.weights if len(linear.weights) == 1 or isinstance(pair[0], AdaptedLinear)]
    # A dense weight may have been pruned and its adapter multiplied into it: there nothing is promised.
    promised = linear.facts.pattern if linear.facts and linear.form != "dense" else None
    pattern = parsed(promised) if promised else TWO_OF_FOUR
    found = [counted(module, tensors, pattern) for module, tensors in weights]
    if not found:
        return None
    count, total, kept = sum(each[0] for each in found), sum(each[1] for each in found), all(each[2] for each in found)
    return Zeros(count, total, promised or ("2:4" if kept and count < total else None), kept)


def counted(
    module: nn.Linear | AdaptedLinear, tensors: Mapping[str, StoredTensor], pattern: Pattern
) -> tuple[int, int, bool]:
    """Zeros, all numbers, and whether the pattern holds."""
    m, n = module.out_features, module.in_features
    zeros, kept = 0, not pattern.is_grouped or n % pattern.group == 0
    for rows in weight_rows(module, tensors):
        zeros += int((rows == 0).sum())
        kept = kept and keeps(rows, pattern)
    if not pattern.is_grouped:
        kept = zeros >= int(round((1 - pattern.density) * n, 6)) * m
    return zeros, m * n, kept


def parsed(text: str) -> Pattern:
    try:
        return Pattern.parse(text)
    except ValueError as error:
        raise CheckpointError(f"compress.json is damaged: {error}. Get it again.") from error


def keeps(rows: Shaped[Tensor, "rows n"], pattern: Pattern) -> bool:
    if not pattern.is_grouped:
        return True
    return bool(((rows != 0).unflatten(1, (-1, pattern.group)).sum(-1) <= pattern.keep).all())


def weight_rows(module: nn.Linear | AdaptedLinear, tensors: Mapping[str, StoredTensor]) -> Iterator[Tensor]:
    """(rows, n) of the weight, a stretch after another."""
    m, step = module.out_features, max(1, BLOCK // max(module.in_features, 1))
    if isinstance(module, nn.Linear):
        with open_safetensors(tensors["weight"].file) as opened:
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
    with open_safetensors(tensor.file) as opened:
        found: Tensor = opened.get_tensor(tensor.name)
    return found
