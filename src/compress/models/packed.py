"""Linears that hold the tensors of a compressed-tensors checkpoint and a PEFT adapter.

What is stored of a weight has the names, shapes and dtypes of compressed-tensors 0.20, so that its own code reads it:

    PackedLinear   weight_packed int32 (m, words): codes one behind the other, low bits first (`pack-quantized`)
    ByteLinear     weight int8 or float8 (m, n) (`int-quantized`, `float-quantized`)
    FloatLinear    weight (m, n), not quantized

beside them weight_scale (m, groups), (m, 1) or (1,), and for grids that are not symmetric weight_zero_point. The
adapter is lora_A (r, n) and lora_B (m, r), in a PEFT folder `lora_A.weight` and `lora_B.weight`.

Dimensions: m outputs, n inputs, r the adapter's rank.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from compress.numerics.grids import FLOAT8, Granularity, QuantType
from compress.own_model.modeling_compress import AdaptedLinear, unpack_bits

InputNumbers = Literal["fp8", "int8"]
WORD = 32  # bits


@dataclass(frozen=True)
class LinearExtras:
    """The parts of a linear besides its weight.

    inputs: what the weight's inputs are rounded to, each token's for itself; the adapter's stay as they are.
    """

    bias: bool
    rank: int
    inputs: InputNumbers | None = None


class RoundedInputs(torch.autograd.Function):
    """Quantize a linear's inputs with a scale for each token, as compressed-tensors does; gradients pass through."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor, kind: InputNumbers) -> Tensor:
        quant_type = QuantType(8, floating=kind == "fp8")
        step = x.abs().amax(-1, keepdim=True) / ((quant_type.highest - quant_type.lowest) / 2)
        step = torch.where(step == 0, torch.finfo(x.dtype).eps, step)
        return quant_type.nearest(x / step) * step

    @staticmethod
    @once_differentiable
    def backward(_ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class LoraLinear(AdaptedLinear):
    """A linear with a weight in any form and a float adapter."""

    def __init__(self, in_features: int, out_features: int, extras: LinearExtras) -> None:
        super().__init__(in_features, out_features, extras.bias)
        self.inputs = extras.inputs
        self.lora_A = self.lora_B = None
        if extras.rank:
            self.lora_A = nn.Parameter(torch.zeros(extras.rank, in_features), requires_grad=False)
            self.lora_B = nn.Parameter(torch.zeros(out_features, extras.rank), requires_grad=False)

    @property
    def num_parameters(self) -> int:
        extras = (self.lora_A, self.lora_B, self.bias)
        return self.in_features * self.out_features + sum(part.numel() for part in extras if part is not None)

    def adapter(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        if self.lora_A is None or self.lora_B is None:
            return None
        return self.lora_A.to(dtype), self.lora_B.T.to(dtype)

    def rounded(self, x: Tensor) -> Tensor:
        inputs: Tensor = x if self.inputs is None else RoundedInputs.apply(x, self.inputs)
        return inputs

    def without_adapter(self, x: Tensor) -> Tensor:
        y: Tensor = super().without_adapter(self.rounded(x))
        return y


class FloatLinear(LoraLinear):
    def __init__(self, in_features: int, out_features: int, extras: LinearExtras) -> None:
        super().__init__(in_features, out_features, extras)
        self.weight = nn.Parameter(torch.zeros(out_features, in_features), requires_grad=False)

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return self.weight[start:stop].to(dtype)

    def without_adapter(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class QuantizedLinear(LoraLinear):
    """
    granularity: what shares a scale along the inputs.
    """

    weight_zero_point: Tensor | None

    def __init__(self, in_features: int, out_features: int, extras: LinearExtras, granularity: Granularity) -> None:
        super().__init__(in_features, out_features, extras)
        self.granularity = granularity
        self.groups = 1 if isinstance(granularity, str) else in_features // granularity
        shape = (1,) if granularity == "tensor" else (out_features, self.groups)
        self.weight_scale = nn.Buffer(torch.zeros(shape))

    def codes(self, start: int, stop: int) -> Tensor:
        """(stop - start, n)."""
        raise NotImplementedError

    def zeros(self, start: int, stop: int) -> Tensor | None:
        """Zero points: (stop - start, groups), or (1,) for a tensor; None where they are 0."""
        raise NotImplementedError

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        groups = self.codes(start, stop).to(dtype).view(stop - start, self.groups, -1)
        zeros = self.zeros(start, stop)
        if zeros is not None:
            groups -= zeros.to(dtype)[..., None]
        scale = self.weight_scale if self.granularity == "tensor" else self.weight_scale[start:stop]
        return groups.mul_(scale.to(dtype)[..., None]).flatten(1)


class PackedLinear(QuantizedLinear):
    """
    weight_shape: int64 (2,), m and n. weight_zero_point: int32 (words, groups), packed along m; int8 (1,) for a tensor.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        extras: LinearExtras,
        granularity: Granularity,
        *,
        symmetric: bool,
        bits: int,
    ) -> None:
        super().__init__(in_features, out_features, extras, granularity)
        self.bits = bits
        self.weight_packed = nn.Buffer(torch.zeros(out_features, words(in_features, bits), dtype=torch.int32))
        self.weight_shape = nn.Buffer(torch.tensor([out_features, in_features]))
        zeros = None
        if not symmetric:
            one = torch.zeros(1, dtype=torch.int8)
            packed = torch.zeros(words(out_features, bits), self.groups, dtype=torch.int32)
            zeros = one if granularity == "tensor" else packed
        self.register_buffer("weight_zero_point", zeros)

    def codes(self, start: int, stop: int) -> Tensor:
        return unpacked(self.weight_packed[start:stop], self.bits, self.in_features)

    def zeros(self, start: int, stop: int) -> Tensor | None:
        zeros = self.weight_zero_point
        if zeros is None or self.granularity == "tensor":
            return zeros
        first = start // WORD * WORD  # rows whose codes begin a word
        packed = zeros[first // WORD * self.bits : words(stop, self.bits)].T.contiguous()
        return unpacked(packed, self.bits, stop - first)[:, start - first :].T


class ByteLinear(QuantizedLinear):
    """weight_zero_point: int8, of weight_scale's shape."""

    weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        extras: LinearExtras,
        granularity: Granularity,
        *,
        symmetric: bool,
        floating: bool,
    ) -> None:
        super().__init__(in_features, out_features, extras, granularity)
        kind = FLOAT8 if floating else torch.int8
        self.weight = nn.Buffer(torch.zeros(out_features, in_features, dtype=kind))
        zeros = None if symmetric else torch.zeros_like(self.weight_scale, dtype=torch.int8)
        self.register_buffer("weight_zero_point", zeros)

    def codes(self, start: int, stop: int) -> Tensor:
        return self.weight[start:stop]

    def zeros(self, start: int, stop: int) -> Tensor | None:
        zeros = self.weight_zero_point
        return zeros if zeros is None or self.granularity == "tensor" else zeros[start:stop]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ByteLinear":
        # To torch an 8-bit float is a float like any other, which .to(dtype) would make wide.
        stored = self.weight.dtype
        self.weight = self.weight.view(torch.uint8)
        super()._apply(fn, recurse)
        self.weight = self.weight.view(stored)
        return self


def words(count: int, bits: int) -> int:
    return math.ceil(count * bits / WORD)


def unpacked(packed: Tensor, bits: int, count: int) -> Tensor:
    """Unpack int32 (rows, words) into signed codes, int8 (rows, count)."""
    stream = packed.view(torch.uint8)
    if bits == 4:
        halves = stream.to(torch.int16)
        codes = ((halves | halves << 4) & 0x0F0F).view(torch.uint8)
    elif bits == 8:
        codes = stream.clone()
    else:
        # Each `bits` bytes hold eight numbers, one of every stretch.
        padded = nn.functional.pad(stream, (0, -stream.shape[1] % bits)).view(len(stream), -1, bits)
        numbers = unpack_bits(padded.transpose(1, 2).flatten(1), bits, 8 * padded.shape[1])
        codes = numbers.view(len(stream), 8, -1).transpose(1, 2).flatten(1)
    codes -= 1 << (bits - 1)  # wraps: the byte of a negative number
    return codes.view(torch.int8)[:, :count]


@contextmanager
def inputs_as_they_are(module: nn.Module) -> Iterator[None]:
    """Switch off input quantization for as long as the context is open.

    It is a step function: what differs by the order of a sum before it can differ by a whole step behind it.
    """
    rounding = {part: part.inputs for part in module.modules() if isinstance(part, LoraLinear)}
    try:
        for part in rounding:
            part.inputs = None
        yield
    finally:
        for part, inputs in rounding.items():
            part.inputs = inputs
