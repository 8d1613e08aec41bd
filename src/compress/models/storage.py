"""Storage formats of linears with quantized or sparse weights and adapters, and the modules that hold them.

    packed   what compressed-tensors and PEFT read, zeros included (`models/packed.py`)
    compact  our own: the kept weights alone, and which these are (`own_model/modeling_compress.py`)
    gguf     llama.cpp's types, as a GGUF file has them (`BlockLinear`)

Dimensions: W = S + B A, S (m, n), A (r, n), B (m, r); m outputs, n inputs.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from compress.models.packed import ByteLinear, FloatLinear, InputNumbers, LinearExtras, PackedLinear
from compress.models.packing import Kept, pack_bits, pack_words, unsigned
from compress.numerics.block_grid import BlockGrid
from compress.numerics.block_types import TYPES
from compress.numerics.grids import Granularity, Grid, QuantType
from compress.numerics.sparsity import Pattern
from compress.numerics.steps import make_grid
from compress.own_model.modeling_compress import AdaptedLinear, CompactLinear

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Storage:
    """How a linear's weight and its adapter are stored.

    bits: of a code; None for floats of the model's dtype. floating: 8-bit floats (e4m3) rather than integers.
    group: what shares a scale along the inputs; in a compact row the last group may be smaller.
    symmetric: 0 has the code 0; compact knows no other. pattern: which weights are kept; of the others compact stores
    nothing, where it is a grouped one. rank: of the adapter. adapter_bits, adapter_group: its codes, compact only.
    inputs: what each token's inputs are rounded to as they come, packed only; the adapter gets them as they are.
    finer: inputs have factors of their own (SLiM-Quant^O), compact only. block_type: of llama.cpp, gguf only.
    """

    form: Literal["packed", "compact", "gguf"]
    bits: int | None
    floating: bool = False
    group: Granularity = "channel"
    symmetric: bool = True
    pattern: Pattern | None = None
    rank: int = 0
    adapter_bits: int | None = None
    adapter_group: int = 128
    inputs: InputNumbers | None = None
    finer: bool = False
    block_type: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for what no form has room for."""
        if self.form == "compact" and (self.inputs is not None or not self.symmetric):
            raise ValueError("Compact linears have symmetric grids and inputs that are not rounded.")
        if self.form == "packed" and (self.adapter_bits is not None or self.finer):
            raise ValueError("Packed linears have adapters of floats, and no factors for single inputs.")
        if self.floating and (self.bits != 8 or not self.symmetric):
            raise ValueError("Grids of floats have 8 bits and are symmetric.")
        if self.inputs is not None and (self.bits is None or self.floating != (self.inputs == "fp8")):
            raise ValueError("Inputs are rounded to fp8 where weights are, and to int8 where weights are integers.")

    @property
    def left_out(self) -> Pattern | None:
        """The sparsity pattern whose zeros the compact form leaves out."""
        return self.pattern if self.pattern is not None and self.pattern.is_grouped else None

    @property
    def in_bytes(self) -> bool:
        """Whether packed form gives each code a byte, as engines want that compute in 8 bits."""
        return self.floating or (self.inputs is not None and self.bits == 8)

    def entry(self) -> dict[str, Any]:
        """The linear's entry in a compact model's config."""
        pattern = self.left_out
        return {
            "bits": self.bits,
            "floating": self.floating,
            "scale_group": self.group,
            "pattern": None if pattern is None else [int(pattern.keep), pattern.group],
            "finer": self.finer,
            "rank": self.rank,
            "adapter_bits": self.adapter_bits,
            "adapter_group": self.adapter_group,
        }


class BlockLinear(AdaptedLinear):
    """
    qweight: uint8 (m, bytes a row). values: what these are, float32 (m, n); not stored, and None of an empty linear.
    """

    def __init__(self, in_features: int, out_features: int, type_name: str, *, bias: bool) -> None:
        super().__init__(in_features, out_features, bias)
        kind = TYPES[type_name]
        size = in_features // kind.block * kind.bytes
        self.qweight: Tensor = nn.Buffer(torch.zeros(out_features, size, dtype=torch.uint8))
        self.values: Tensor | None
        self.register_buffer("values", None, persistent=False)

    @property
    def num_parameters(self) -> int:
        return self.in_features * self.out_features + (0 if self.bias is None else self.out_features)

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        assert self.values is not None
        return self.values[start:stop].to(dtype)

    def adapter(self, _dtype: torch.dtype) -> None:
        return None

    def without_adapter(self, x: Tensor) -> Tensor:
        assert self.values is not None
        return nn.functional.linear(x, self.values.to(x.dtype), self.bias)


def empty_linear(
    storage: Storage, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype
) -> AdaptedLinear:
    """Build an empty module with every stored tensor in its shape and dtype, on torch's default device."""
    n, m = in_features, out_features
    extras = LinearExtras(bias, storage.rank, storage.inputs)
    linear: AdaptedLinear
    if storage.block_type is not None:
        linear = BlockLinear(n, m, storage.block_type, bias=bias)
    elif storage.form == "compact":
        linear = CompactLinear(n, m, storage.entry(), bias=bias)
    elif storage.bits is None:
        linear = FloatLinear(n, m, extras)
    elif storage.in_bytes:
        linear = ByteLinear(n, m, extras, storage.group, symmetric=storage.symmetric, floating=storage.floating)
    else:
        linear = PackedLinear(n, m, extras, storage.group, symmetric=storage.symmetric, bits=storage.bits)
    return linear.to(dtype)


def stored_linear(  # noqa: PLR0913 (all that a linear consists of)
    storage: Storage,
    weight: Float[Tensor, "m n"],
    grid: Grid | None,
    mask: Bool[Tensor, "m n"] | None,
    A: Float[Tensor, "r n"] | None,
    B: Float[Tensor, "m r"] | None,
    bias: Float[Tensor, "m"] | None,
    dtype: torch.dtype,
) -> AdaptedLinear:
    """weight: S, the grid's own values, its step already rounded to `dtype`; zeros where the mask is False."""
    m, n = weight.shape
    with torch.device("meta"):
        linear = empty_linear(storage, n, m, bias=bias is not None, dtype=dtype)
    if isinstance(linear, BlockLinear):
        assert isinstance(grid, BlockGrid)
        linear.values = grid.dequantized(weight)
        tensors: Tensors = {"qweight": grid.encoded(weight)}
    elif storage.form == "compact":
        tensors = compact_tensors(storage, weight, grid, mask, dtype)
    else:
        tensors = packed_tensors(storage, weight, grid, dtype)
    if A is not None and B is not None:
        tensors |= adapter_tensors(storage, A, B, dtype)
    if bias is not None:
        tensors["bias"] = bias.to(dtype)
    linear.load_state_dict({name: tensor.contiguous() for name, tensor in tensors.items()}, assign=True)
    return linear


def packed_tensors(storage: Storage, weight: Tensor, grid: Grid | None, dtype: torch.dtype) -> Tensors:
    if grid is None:
        return {"weight": weight.to(dtype)}
    assert isinstance(grid.quant_type, QuantType)
    scale, codes, bits = grid.step.to(dtype), grid.codes(weight), grid.quant_type.bits
    zero = None if grid.zero is None else grid.zero.to(torch.int8)
    if storage.group == "tensor":
        scale, zero = scale.view(1), None if zero is None else zero.view(1)
    elif zero is not None and not storage.in_bytes:
        zero = pack_words(zero.T, bits).T
    zeros = {} if zero is None else {"weight_zero_point": zero}
    if storage.in_bytes:
        return zeros | {"weight": codes, "weight_scale": scale}
    shape = torch.tensor(weight.shape)
    return zeros | {"weight_packed": pack_words(codes, bits), "weight_scale": scale, "weight_shape": shape}


def compact_tensors(
    storage: Storage, weight: Tensor, grid: Grid | None, mask: Tensor | None, dtype: torch.dtype
) -> Tensors:
    pattern = storage.left_out
    if pattern is None or mask is None:
        return below("weight", matrix_tensors(weight, grid, None, dtype))
    kept = Kept(mask, pattern)
    return below("weight", {"places": kept.places()} | matrix_tensors(weight, grid, kept, dtype))


def matrix_tensors(matrix: Float[Tensor, "m n"], grid: Grid | None, kept: Kept | None, dtype: torch.dtype) -> Tensors:
    """The tensors that a `StoredMatrix` stores for a matrix's values."""
    if grid is None:
        return {"values": (matrix if kept is None else kept.of(matrix)).to(dtype)}
    assert isinstance(grid.quant_type, QuantType)
    bits, codes = grid.quant_type.bits, grid.codes(matrix)
    codes = codes if kept is None else kept.of(codes)
    numbers = codes.view(torch.uint8) if grid.quant_type.floating else unsigned(codes, bits)
    shares = {} if grid.finer is None else {"shares": (1 / grid.finer).to(dtype)}
    return shares | {"codes": pack_bits(numbers, bits), "scale": grid.step.to(dtype)}


def adapter_tensors(storage: Storage, A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], dtype: torch.dtype) -> Tensors:
    if storage.form == "packed":
        return {"lora_A": A.to(dtype), "lora_B": B.to(dtype)}
    tensors: Tensors = {}
    for name, factor in (("first", A), ("second", B.T)):
        grid = None
        if storage.adapter_bits is not None:
            quant_type, group = QuantType(storage.adapter_bits), storage.adapter_group
            grid = make_grid(factor, quant_type, group=group, method="mse", stored=dtype)
        tensors |= below(name, matrix_tensors(factor, grid, None, dtype))
    return tensors


def below(part: str, tensors: Tensors) -> Tensors:
    return {f"{part}.{name}": tensor for name, tensor in tensors.items()}


def num_parameters(module: nn.Module) -> int:
    """A tied weight counts once. Of a linear stored in fewer bits, what it keeps of its weight and adapter."""
    stored = [part for part in module.modules() if isinstance(part, AdaptedLinear)]
    counted = {id(parameter) for part in stored for parameter in part.parameters()}
    plain = (parameter.numel() for parameter in module.parameters() if id(parameter) not in counted)
    return sum(part.num_parameters for part in stored) + sum(plain)
