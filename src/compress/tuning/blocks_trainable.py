"""A block with all that may be trained of it as parameters, and back to what its checkpoint stores.

Trained is what is stored as a float: gains, biases, dense or thin linears, adapters, the scales of codes. What is
stored as an integer stays: codes of weights, and which weights a pattern keeps. A weight that is stored as an exact
zero stays zero. Adapters that are stored as codes are trained through the rounding, whose gradient is taken for that
of the identity (straight-through), their scales by the gradient of LSQ (arXiv 1902.08153), and encoded again.

Dimensions: W (m, n), A (r, n), B (m, r); m outputs, n inputs.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from compress.models.modeling_compact import CompactLinear, StoredMatrix
from compress.models.modeling_sliced import replace
from compress.models.packed import FloatLinear, LoraLinear, QuantizedLinear
from compress.models.packing import Kept, pack_bits, unsigned
from compress.numerics.sparsity import Pattern

Tensors = dict[str, Tensor]


class Matrix(nn.Module):
    """A weight or a factor, some of it parameters."""

    def forward(self) -> Float[Tensor, "rows columns"]:
        raise NotImplementedError

    def stored(self, dtype: torch.dtype) -> Tensors:
        """What of it may have changed, as it is stored. dtype: of stored floats, where codes depend on it."""
        raise NotImplementedError


class FloatMatrix(Matrix):
    """Numbers stored as they are; those outside the mask are zero and stay so.

    pattern: where only those inside it are stored, and in which order.
    """

    mask: Tensor | None

    def __init__(
        self,
        values: Float[Tensor, "rows columns"],
        mask: Bool[Tensor, "rows columns"] | None = None,
        pattern: Pattern | None = None,
    ) -> None:
        super().__init__()
        self.values = nn.Parameter(values.clone())
        self.register_buffer("mask", mask)
        self.pattern = pattern

    def forward(self) -> Float[Tensor, "rows columns"]:
        return self.values if self.mask is None else self.values * self.mask

    def stored(self, dtype: torch.dtype) -> Tensors:
        values = self.values.detach()
        if self.mask is not None and self.pattern is not None:
            values = Kept(self.mask, self.pattern).of(values)
        return {"values": values}


class ScaledMatrix(Matrix):
    """Frozen codes times a scale for each `group` neighbouring columns.

    codes: as floats, zero points subtracted. scale: in its stored shape, (rows or 1, groups) or (1,).
    """

    codes: Tensor

    def __init__(self, codes: Float[Tensor, "rows columns"], scale: Float[Tensor, "*shape"], group: int) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.scale = nn.Parameter(scale.clone())
        self.group = group

    def forward(self) -> Float[Tensor, "rows columns"]:
        return self.codes * spread(self.scale, self.group, self.codes.shape[1])

    def stored(self, dtype: torch.dtype) -> Tensors:
        return {"scale": self.scale.detach()}


class RoundedMatrix(Matrix):
    """Numbers stored as integer codes of `bits` bits, which are found again when they have been trained."""

    def __init__(
        self, values: Float[Tensor, "rows columns"], scale: Float[Tensor, "_ groups"], group: int, bits: int
    ) -> None:
        super().__init__()
        self.values = nn.Parameter(values.clone())
        self.scale = nn.Parameter(scale.clone())
        self.group = group
        self.bits = bits

    def forward(self) -> Float[Tensor, "rows columns"]:
        scale = spread(self.scale, self.group, self.values.shape[1])
        within = self._clamped(self.values / scale)
        return (within + (within.round() - within).detach()) * scale

    def _clamped(self, codes: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        half = 1 << (self.bits - 1)
        return codes.clamp(-half, half - 1)

    def stored(self, dtype: torch.dtype) -> Tensors:
        """The codes are those for the scale as it will be stored, in `dtype`."""
        scale = self.scale.detach().to(dtype)
        steps = spread(scale.to(self.values.dtype), self.group, self.values.shape[1])
        codes = self._clamped(self.values.detach() / steps).round().to(torch.int8)
        return {"codes": pack_bits(unsigned(codes, self.bits), self.bits), "scale": scale}


# Of packed and plain linears.
FLAT_NAMES = {
    "weight.values": "weight",
    "weight.scale": "weight_scale",
    "lora_A.values": "lora_A",
    "lora_B.values": "lora_B",
}


def spread(scale: Float[Tensor, "*shape"], group: int, columns: int) -> Float[Tensor, "_ _"]:
    """A scale for every column, (rows or 1, columns or 1)."""
    scale = scale.view(1, 1) if scale.ndim == 1 else scale
    return scale if scale.shape[1] == 1 else scale.repeat_interleave(group, 1)[:, :columns]


class TrainableLinear(nn.Module):
    """y = W x + b + B (A x).

    matrices: W, and where there is an adapter A and B, by their names in the stored linear. names: what it calls parts
    of them, if not `matrix.part`. transposed: it is B^T that is stored. rounded: what W's inputs pass; A's do not.
    """

    def __init__(
        self,
        matrices: Mapping[str, Matrix],
        bias: Tensor | None,
        names: Mapping[str, str] = FLAT_NAMES,
        *,
        transposed: bool = False,
        rounded: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.matrices = nn.ModuleDict(matrices)
        self.bias = None if bias is None else nn.Parameter(bias.clone())
        self.names = names
        self.transposed = transposed
        self.rounded = rounded

    def forward(self, x: Tensor) -> Tensor:
        weight, *adapter = (matrix() for matrix in self.matrices.values())
        y = nn.functional.linear(x if self.rounded is None else self.rounded(x), weight, self.bias)
        if not adapter:
            return y
        first, second = adapter
        return y + x @ first.T @ (second if self.transposed else second.T)

    def stored(self, dtype: torch.dtype) -> Tensors:
        """What is stored of it and may have changed, by names below the linear."""
        tensors = {} if self.bias is None else {"bias": self.bias.detach()}
        for name, matrix in self.matrices.items():
            assert isinstance(matrix, Matrix)
            for part, tensor in matrix.stored(dtype).items():
                tensors[self.names.get(f"{name}.{part}", f"{name}.{part}")] = tensor
        return tensors


def trainable(block: nn.Module) -> nn.Module:
    """A copy of a block, its floats as parameters that want gradients."""
    copied = copy.deepcopy(block)
    for path, module in list(copied.named_modules()):
        linear = trainable_linear(module)
        if linear is not None:
            replace(copied, path, linear)
    return copied.requires_grad_(True)


def stored(block: nn.Module, dtype: torch.dtype) -> Tensors:
    """What the checkpoint stores of a trainable block and may have changed, by names below the block.

    dtype: in which scales are stored, that codes are found for. Floats come as they were computed.
    """
    linears = {path: module for path, module in block.named_modules() if isinstance(module, TrainableLinear)}
    tensors = {
        name: parameter.detach()
        for name, parameter in block.named_parameters()
        if not any(name.startswith(f"{path}.") for path in linears)
    }
    for path, linear in linears.items():
        tensors |= {f"{path}.{name}": tensor for name, tensor in linear.stored(dtype).items()}
    return tensors


def trainable_linear(linear: nn.Module) -> TrainableLinear | None:
    """None for a module whose parameters can be trained as they are."""
    if isinstance(linear, CompactLinear):
        parts = {"weight": linear.weight, "first": linear.first, "second": linear.second}
        matrices = {name: compact_matrix(part, linear) for name, part in parts.items() if part is not None}
        return TrainableLinear(matrices, linear.bias, {}, transposed=True)
    if isinstance(linear, LoraLinear):
        factors = {"lora_A": linear.lora_A, "lora_B": linear.lora_B}
        adapter = {name: FloatMatrix(factor.detach()) for name, factor in factors.items() if factor is not None}
        return TrainableLinear({"weight": packed_weight(linear)} | adapter, linear.bias, rounded=linear.rounded)
    if isinstance(linear, nn.Linear) and bool((linear.weight == 0).any()):
        return TrainableLinear({"weight": sparse_matrix(linear.weight.detach())}, linear.bias)
    return None


def sparse_matrix(weight: Float[Tensor, "m n"]) -> FloatMatrix:
    """Exact zeros are pruned weights."""
    return FloatMatrix(weight, weight != 0)


def packed_weight(linear: LoraLinear) -> Matrix:
    if isinstance(linear, FloatLinear):
        return sparse_matrix(linear.weight.detach())
    assert isinstance(linear, QuantizedLinear)
    scale = linear.weight_scale
    unscaled = copy.deepcopy(linear)
    unscaled.weight_scale = nn.Buffer(torch.ones_like(scale))
    codes = unscaled.rows(0, linear.out_features, scale.dtype)
    return ScaledMatrix(codes, scale, linear.in_features // linear.groups)


def compact_matrix(matrix: StoredMatrix, linear: CompactLinear) -> Matrix:
    scale: Any = matrix.scale
    values: Any = matrix.values
    rows = matrix.num_rows
    if matrix.bits is None:
        spread_out = matrix.rows(0, rows, values.dtype)
        if matrix.places is None:
            return FloatMatrix(spread_out)
        mask = matrix.spread(torch.ones_like(values), 0, rows) != 0
        return FloatMatrix(spread_out, mask, Pattern(matrix.keep, matrix.group))
    if matrix is not linear.weight:
        return RoundedMatrix(matrix.rows(0, rows, scale.dtype), scale, matrix.scale_group, matrix.bits)
    unscaled = copy.deepcopy(matrix)
    unscaled.scale = torch.ones_like(scale)
    return ScaledMatrix(unscaled.rows(0, rows, scale.dtype), scale, matrix.scale_group)
