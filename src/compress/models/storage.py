"""How linears with quantized or sparse weights and adapters are stored, and the modules that hold them so.

    packed   what compressed-tensors and PEFT read, zeros included:
               PackedLinear  weight_packed int32 (m, words): codes without gaps, low bits first (`pack-quantized`)
               ByteLinear    weight int8 or float8 (m, n) (`int-quantized`, `float-quantized`)
               Float4Linear  weight_packed uint8 (m, n / 2) (`nvfp4-pack-quantized`, `mxfp4-pack-quantized`)
               FloatLinear   weight (m, n), not quantized
    compact  our own: the kept weights alone, and which these are (`own_model/modeling_compress.py`)
    gguf     llama.cpp's types, as a GGUF file has them (BlockLinear)

What is packed has the names, shapes and dtypes of compressed-tensors 0.20, so that its own code reads it: beside the
codes weight_scale (m, groups), (m, 1), (1,) or of blocks (ceil(m / 128), n / 128), and for grids that are not symmetric
weight_zero_point. The adapter is lora_A (r, n) and lora_B (m, r), in a PEFT folder `lora_A.weight` and `lora_B.weight`.

Dimensions: W = S + B A, S (m, n), A (r, n), B (m, r); m outputs, n inputs, r the adapter's rank.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from compress.numerics.block_types import TYPES
from compress.numerics.grids import E2M1, FLOAT4_STEPS, FLOAT8, SIDE, QuantizationArgs
from compress.numerics.sparsity import Pattern
from compress.own_model.modeling_compress import AdaptedLinear, CompactLinear, LowRankLinear, PivotLinear, unpack_bits

InputNumbers = Literal["fp8", "int8"]
Linear = nn.Linear | LowRankLinear | PivotLinear | AdaptedLinear
WORD = 32  # bits
INTEGERS = {1: torch.uint8, 4: torch.int32}  # by their bytes


@dataclass(frozen=True)
class Storage:
    """How a linear's weight and its adapter are stored.

    weights: how they are quantized; None for floats of the model's dtype. Compact knows symmetric grids without 4-bit
    floats and blocks; the last group of a row may be smaller there.
    pattern: which weights are kept; of the others compact stores nothing, where it is a grouped one.
    rank: of the adapter. adapter: how its factors are quantized; None for floats. Compact only.
    input_activations: what each token's inputs are rounded to, packed only; the adapter gets them as they are.
    important_inputs: inputs have factors of their own (SLiM-Quant^O), compact only.
    block_type: of llama.cpp, gguf only.
    """

    form: Literal["packed", "compact", "gguf"]
    weights: QuantizationArgs | None = None
    pattern: Pattern | None = None
    rank: int = 0
    adapter: QuantizationArgs | None = None
    input_activations: InputNumbers | None = None
    important_inputs: bool = False
    block_type: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for what no form has room for."""
        weights = self.weights
        fits = weights is None or (weights.symmetric and weights.strategy != "block" and not self.in_float4)
        if self.form == "compact" and (self.input_activations is not None or not fits):
            raise ValueError("Compact linears have symmetric grids, no blocks or 4-bit floats, and no rounded inputs.")
        if self.form == "packed" and (self.adapter is not None or self.important_inputs):
            raise ValueError("Packed linears have adapters of floats, and no factors for single inputs.")
        rounds = {"fp8": "float", "int8": "int"}.get(str(self.input_activations))
        if rounds is not None and (weights is None or self.in_float4 or weights.type != rounds):
            raise ValueError("Inputs are rounded to fp8 where weights are, and to int8 where weights are integers.")

    @property
    def left_out(self) -> Pattern | None:
        """The sparsity pattern whose zeros the compact form leaves out."""
        return self.pattern if self.pattern is not None and self.pattern.is_grouped else None

    @property
    def scheme(self) -> "Storage | None":
        """How the weight alone is stored; None where it is a float."""
        return None if self.weights is None else replace(self, rank=0, pattern=None, adapter=None)

    @property
    def type_name(self) -> str:
        """llama.cpp's name of its type, or one such as int4-g128."""
        return self.block_type or (self.weights or QuantizationArgs()).name

    @property
    def in_bytes(self) -> bool:
        """Whether packed form gives each code a byte, as engines want that compute in 8 bits."""
        weights, rounds = self.weights, self.input_activations is not None
        return weights is not None and weights.num_bits == 8 and (weights.type == "float" or rounds)

    @property
    def in_float4(self) -> bool:
        return self.weights is not None and self.weights.scale_dtype is not None

    def entry(self) -> dict[str, Any]:
        weights, adapter = (None if args is None else args.model_dump() for args in (self.weights, self.adapter))
        pattern = None if self.left_out is None else [int(self.left_out.keep), self.left_out.group]
        kept = {"pattern": pattern, "important_inputs": self.important_inputs}
        return {"weights": weights, **kept, "rank": self.rank, "adapter": adapter}


class RoundedInputs(torch.autograd.Function):
    """Quantize a linear's inputs with a scale for each token, as compressed-tensors does; gradients pass through.

    group: how many inputs of a token share one; None for all.
    """

    @staticmethod
    def forward(_ctx: Any, x: Tensor, kind: InputNumbers, group: int | None) -> Tensor:
        if group is not None:
            return RoundedInputs.forward(_ctx, x.unflatten(-1, (-1, group)), kind, None).flatten(-2)
        args = QuantizationArgs(num_bits=8, type="float" if kind == "fp8" else "int")
        step = x.abs().amax(-1, keepdim=True) / ((args.highest - args.lowest) / 2)
        step = torch.where(step == 0, torch.finfo(x.dtype).eps, step)
        return args.nearest(x / step) * step

    @staticmethod
    @once_differentiable
    def backward(_ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


class LoraLinear(AdaptedLinear):
    """A linear with a weight in any form and a float adapter.

    inputs: what each token's are rounded to for the weight; the adapter's stay as they are. num_bits: of a code.
    """

    kind: ClassVar[str]
    num_bits: int | None = None

    def __init__(self, in_features: int, out_features: int, storage: Storage, *, bias: bool) -> None:
        super().__init__(in_features, out_features, bias)
        self.inputs = storage.input_activations
        self.input_group = SIDE if storage.weights is not None and storage.weights.strategy == "block" else None
        self.lora_A = self.lora_B = None
        if storage.rank:
            self.lora_A = nn.Parameter(torch.zeros(storage.rank, in_features), requires_grad=False)
            self.lora_B = nn.Parameter(torch.zeros(out_features, storage.rank), requires_grad=False)

    @property
    def num_parameters(self) -> int:
        extras = (self.lora_A, self.lora_B, self.bias)
        return self.in_features * self.out_features + sum(part.numel() for part in extras if part is not None)

    def adapter(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        if self.lora_A is None or self.lora_B is None:
            return None
        return self.lora_A.to(dtype), self.lora_B.T.to(dtype)

    def rounded(self, x: Tensor) -> Tensor:
        return x if self.inputs is None else RoundedInputs.apply(x, self.inputs, self.input_group)

    def without_adapter(self, x: Tensor) -> Tensor:
        return super().without_adapter(self.rounded(x))


class FloatLinear(LoraLinear):
    kind = "adapted"

    def __init__(self, in_features: int, out_features: int, storage: Storage, *, bias: bool) -> None:
        super().__init__(in_features, out_features, storage, bias=bias)
        self.weight = nn.Parameter(torch.zeros(out_features, in_features), requires_grad=False)

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return self.weight[start:stop].to(dtype)

    def without_adapter(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class BlockLinear(LoraLinear):
    """A weight in one of llama.cpp's block types.

    qweight: uint8 (m, bytes a row). values: what these are, float32 (m, n); not stored, and None of an empty linear.
    """

    kind = "blocks"

    def __init__(self, in_features: int, out_features: int, storage: Storage, *, bias: bool) -> None:
        super().__init__(in_features, out_features, storage, bias=bias)
        block = TYPES[str(storage.block_type)]
        size = in_features // block.block * block.bytes
        self.qweight: Tensor = nn.Buffer(torch.zeros(out_features, size, dtype=torch.uint8))
        self.values: Tensor | None
        self.register_buffer("values", None, persistent=False)

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        assert self.values is not None
        return self.values[start:stop].to(dtype)

    def without_adapter(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.rows(0, self.out_features, x.dtype), self.bias)


class QuantizedLinear(LoraLinear):
    """Codes and scales. groups: how many scales a row has. as_stored: buffers of floats that no .to(dtype) changes."""

    weight_zero_point: Tensor | None
    num_bits: int
    as_stored: tuple[str, ...] = ()

    def __init__(self, in_features: int, out_features: int, storage: Storage, *, bias: bool) -> None:
        super().__init__(in_features, out_features, storage, bias=bias)
        assert storage.weights is not None
        self.args, self.num_bits, size = storage.weights, storage.weights.num_bits, storage.weights.group_size
        self.groups = 1 if size is None else in_features // size
        scales: tuple[int, ...] = (1,) if self.args.strategy == "tensor" else (out_features, self.groups)
        if self.args.strategy == "block":
            self.groups = in_features // SIDE
            scales = math.ceil(out_features / SIDE), self.groups
        self.weight_scale = nn.Buffer(torch.zeros(scales))

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
        if self.args.strategy == "block":
            scale = self.weight_scale[torch.arange(start, stop, device=self.weight_scale.device) // SIDE]
        else:
            scale = self.weight_scale if self.args.strategy == "tensor" else self.weight_scale[start:stop]
        return groups.mul_(scale.to(dtype)[..., None]).flatten(1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        # To torch an 8-bit float is a float like any other, which .to(dtype) would make wide.
        dtypes = {name: self.get_buffer(name).dtype for name in self.as_stored}
        for name, dtype in dtypes.items():
            setattr(self, name, self.get_buffer(name).view(INTEGERS[dtype.itemsize]))
        super()._apply(fn, recurse)
        for name, dtype in dtypes.items():
            setattr(self, name, self.get_buffer(name).view(dtype))
        return self


class PackedLinear(QuantizedLinear):
    """A weight in integers packed into int32 words.

    weight_shape: int64 (2,), m and n. weight_zero_point: int32 (words, groups), packed along m; int8 (1,) for a tensor.
    """

    kind = "packed"

    def __init__(self, in_features: int, out_features: int, storage: Storage, *, bias: bool) -> None:
        super().__init__(in_features, out_features, storage, bias=bias)
        self.weight_packed = nn.Buffer(torch.zeros(out_features, words(in_features, self.num_bits), dtype=torch.int32))
        self.weight_shape = nn.Buffer(torch.tensor([out_features, in_features]))
        zeros = None
        if not self.args.symmetric and self.args.strategy == "tensor":
            zeros = torch.zeros(1, dtype=torch.int8)
        elif not self.args.symmetric:
            zeros = torch.zeros(words(out_features, self.num_bits), self.groups, dtype=torch.int32)
        self.register_buffer("weight_zero_point", zeros)

    def codes(self, start: int, stop: int) -> Tensor:
        return unpacked(self.weight_packed[start:stop], self.num_bits, self.in_features)

    def zeros(self, start: int, stop: int) -> Tensor | None:
        zeros = self.weight_zero_point
        if zeros is None or self.args.strategy == "tensor":
            return zeros
        first = start // WORD * WORD  # rows whose codes begin a word
        packed = zeros[first // WORD * self.num_bits : words(stop, self.num_bits)].T.contiguous()
        return unpacked(packed, self.num_bits, stop - first)[:, start - first :].T


class ByteLinear(QuantizedLinear):
    """A weight in 8-bit integers or floats. weight_zero_point: int8, of weight_scale's shape."""

    kind = "bytes"
    as_stored = ("weight",)
    weight: Tensor

    def __init__(self, in_features: int, out_features: int, storage: Storage, *, bias: bool) -> None:
        super().__init__(in_features, out_features, storage, bias=bias)
        self.weight = nn.Buffer(torch.zeros(out_features, in_features, dtype=self.args.stored))
        zeros = None if self.args.symmetric else torch.zeros_like(self.weight_scale, dtype=torch.int8)
        self.register_buffer("weight_zero_point", zeros)

    def codes(self, start: int, stop: int) -> Tensor:
        return self.weight[start:stop]

    def zeros(self, start: int, stop: int) -> Tensor | None:
        zeros = self.weight_zero_point
        return zeros if zeros is None or self.args.strategy == "tensor" else zeros[start:stop]


class Float4Linear(QuantizedLinear):
    """A weight in 4-bit floats, NVFP4 or MXFP4.

    weight_packed: two e2m1 numbers a byte, the first in the low bits: 8 for the sign and a place in `E2M1`.
    weight_scale: (m, groups); of NVFP4 float8, to be divided by weight_global_scale, float32 (1,); of MXFP4 uint8, the
    exponent of 2, plus 127.
    """

    kind = "float4"
    weight_global_scale: Tensor

    def __init__(self, in_features: int, out_features: int, storage: Storage, *, bias: bool) -> None:
        super().__init__(in_features, out_features, storage, bias=bias)
        self.weight_packed = nn.Buffer(torch.zeros(out_features, in_features // 2, dtype=torch.uint8))
        scales = torch.zeros(out_features, self.groups, dtype=torch.uint8)
        if self.args.strategy == "tensor_group":
            self.as_stored = ("weight_scale", "weight_global_scale")
            self.weight_global_scale = nn.Buffer(torch.ones(1))
            scales = scales.view(FLOAT8)
        self.weight_scale = nn.Buffer(scales)

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        packed, scale = self.weight_packed[start:stop], self.weight_scale[start:stop]
        table = torch.tensor((*E2M1, *(-number for number in E2M1)), device=packed.device)
        values = table[torch.stack([packed & 15, packed >> 4], dim=2).int()].view(len(packed), self.groups, -1)
        scale = scale.float() / self.weight_global_scale if self.as_stored else scale.view(FLOAT4_STEPS[32]).float()
        return values.mul_(scale[..., None]).flatten(1).to(dtype)


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

    It is a step function: what differs by the order of a sum before it can differ by a whole step after it.
    """
    rounding = {part: part.inputs for part in module.modules() if isinstance(part, LoraLinear)}
    try:
        for part in rounding:
            part.inputs = None
        yield
    finally:
        for part, inputs in rounding.items():
            part.inputs = inputs


def empty_linear(
    storage: Storage, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype
) -> AdaptedLinear:
    """Build an empty module with every stored tensor in its shape and dtype, on torch's default device."""
    linear: AdaptedLinear
    if storage.form == "compact":
        linear = CompactLinear(in_features, out_features, storage.entry(), bias=bias)
    else:
        kind: type[LoraLinear] = ByteLinear if storage.in_bytes else PackedLinear
        if storage.in_float4:
            kind = Float4Linear
        elif storage.block_type is not None:
            kind = BlockLinear
        elif storage.weights is None:
            kind = FloatLinear
        linear = kind(in_features, out_features, storage, bias=bias)
    return linear.to(dtype)


def num_parameters(module: nn.Module) -> int:
    """A tied weight counts once. Of a linear stored in fewer bits, what it keeps of its weight and adapter."""
    stored = [part for part in module.modules() if isinstance(part, AdaptedLinear)]
    counted = {id(parameter) for part in stored for parameter in part.parameters()}
    plain = (parameter.numel() for parameter in module.parameters() if id(parameter) not in counted)
    return sum(part.num_parameters for part in stored) + sum(plain)


KINDS = {LowRankLinear: "factors", PivotLinear: "pivot", CompactLinear: "compact"}


@dataclass(frozen=True)
class Form:
    """How a linear of n inputs and m outputs is stored.

    kind: `kernel` is packed, and multiplied as it is (`models/int4.py`). bits: of a weight's code; None for floats.
    pattern: which weights are kept, where only these are stored. rank: of the factors, or of the adapter.
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
            return cls(kind, m, n, weight.num_bits, pattern, 0 if linear.first is None else linear.first.num_rows)
        if isinstance(linear, LoraLinear):
            return cls(linear.kind, m, n, linear.num_bits, rank=0 if linear.lora_A is None else len(linear.lora_A))
        return cls(kind, m, n)


def linears_of(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """Path and module of each linear; of one that consists of linears, the whole."""
    whole: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if isinstance(module, Linear) and not path.startswith(whole):
            whole = (*whole, f"{path}.")
            yield path, module
