"""Packed linears as compressed-tensors reads them, with a LoRA adapter that PEFT and vLLM read; and packing itself.

Codes and sparsity patterns are packed into bits, a linear's weight and adapter into the tensors that are stored.
Compressed-tensors' own sparse formats are left alone: engines have dropped them, and refuse a checkpoint that has a
`sparsity_config`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int32, Integer, Shaped, UInt8
from torch import Tensor, nn

from compress.models.storage import BlockLinear, Storage, empty_linear
from compress.numerics.block_grid import BlockGrid
from compress.numerics.grids import E2M1, FLOAT4_STEPS, FLOAT8, SIDE, Grid, QuantizationArgs
from compress.numerics.sparsity import Pattern
from compress.numerics.steps import make_grid
from compress.own_model.modeling_compress import AdaptedLinear, combinations, place_bits

Tensors = dict[str, Tensor]


def pack_bits(numbers: Integer[Tensor, "rows count"], bits: int) -> UInt8[Tensor, "rows _"]:
    """Pack numbers from 0 to 2^bits - 1, in the order of `unpack_bits`."""
    eighth = math.ceil(numbers.shape[1] / 8)
    stretches = torch.nn.functional.pad(numbers, (0, 8 * eighth - numbers.shape[1])).view(-1, 8, eighth)
    planes = torch.zeros(len(numbers), bits, eighth, dtype=torch.uint8, device=numbers.device)
    for place in range(8):
        first, shift = divmod(place * bits, 8)
        number = stretches[:, place].to(torch.int32) << shift
        for later in range(math.ceil((shift + bits) / 8)):
            planes[:, first + later] |= (number >> (8 * later) & 255).to(torch.uint8)
    return planes.flatten(1)


def pack_words(codes: Int[Tensor, "rows count"], bits: int) -> Int32[Tensor, "rows _"]:
    """Pack signed codes as compressed-tensors does: without gaps, low bits first."""
    rows, count = codes.shape
    # Of 32 numbers, which fill `bits` words, each eight are one of every stretch.
    padded = torch.nn.functional.pad(unsigned(codes, bits), (0, -count % 32)).view(rows, -1, 8)
    planes = pack_bits(padded.transpose(1, 2).flatten(1), bits)
    stream = planes.view(rows, bits, -1).transpose(1, 2).flatten()
    return stream.view(torch.int32).view(rows, -1)[:, : math.ceil(count * bits / 32)].contiguous()


def unsigned(codes: Int[Tensor, "rows count"], bits: int) -> UInt8[Tensor, "rows count"]:
    return codes.to(torch.int8).view(torch.uint8) + (1 << (bits - 1))  # wraps as negative numbers' bytes do


@dataclass(frozen=True)
class Kept:
    """The weights that a sparsity pattern keeps. mask: (m, n)."""

    mask: Bool[Tensor, "m n"]
    pattern: Pattern

    def of(self, weights: Shaped[Tensor, "m n"]) -> Shaped[Tensor, "m _"]:
        """The kept weights: the first of all groups, then the second, and so on."""
        return weights[self.mask].view(len(weights), -1, int(self.pattern.keep)).transpose(1, 2).flatten(1)

    def places(self) -> UInt8[Tensor, "m _"]:
        """The index of each group's combination. Raises ValueError where a group keeps not as many as the pattern."""
        keep, group, device = int(self.pattern.keep), self.pattern.group, self.mask.device
        digits = 2 ** torch.arange(group, dtype=torch.int32, device=device)
        table = combinations(keep, group, device)
        numbers = torch.full((2**group,), -1, device=device)
        numbers[digits[table].sum(1)] = torch.arange(len(table), device=device)
        found = numbers[(self.mask.unflatten(1, (-1, group)) * digits).sum(-1)]
        if (found < 0).any():
            raise ValueError(f"a group of the mask does not keep {keep} of {group}")
        return pack_bits(found, place_bits(keep, group))


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
    """Make the module. weight: S, on the grid, whose step is rounded to `dtype`; zeros where the mask is False."""
    m, n = weight.shape
    with torch.device("meta"):
        linear = empty_linear(storage, n, m, bias=bias is not None, dtype=dtype)
    if isinstance(linear, BlockLinear):
        assert isinstance(grid, BlockGrid)
        linear.values = grid.dequantized(weight)
        tensors: Tensors = {"qweight": grid.encoded(weight)}
    elif storage.form == "compact":
        kept = None if mask is None or storage.left_out is None else Kept(mask, storage.left_out)
        places = {} if kept is None else {"places": kept.places()}
        tensors = below("weight", places | matrix_tensors(weight, grid, kept, dtype))
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
    assert isinstance(grid.kind, QuantizationArgs)
    if storage.in_float4:
        values = grid.codes(weight).float().contiguous()
        numbers = torch.bucketize(values.abs(), values.new_tensor(E2M1)) | (values < 0).long() << 3
        packed = (numbers[:, ::2] | numbers[:, 1::2] << 4).to(torch.uint8)
        steps = (grid.step * grid.divisor).to(FLOAT4_STEPS[grid.group_size])
        if steps.dtype != FLOAT8:
            return {"weight_packed": packed, "weight_scale": steps.view(torch.uint8)}
        divisor = torch.full((1,), grid.divisor, device=packed.device)
        return {"weight_packed": packed, "weight_scale": steps, "weight_global_scale": divisor}
    scale, codes, bits = grid.step.to(dtype), grid.codes(weight), grid.kind.num_bits
    zero = None if grid.zero is None else grid.zero.to(torch.int8)
    if grid.kind.strategy == "block":
        scale = scale[::SIDE]
    if grid.kind.strategy == "tensor":
        scale, zero = scale.view(1), None if zero is None else zero.view(1)
    elif zero is not None and not storage.in_bytes:
        zero = pack_words(zero.T, bits).T
    zeros = {} if zero is None else {"weight_zero_point": zero}
    if storage.in_bytes:
        return zeros | {"weight": codes, "weight_scale": scale}
    shape = torch.tensor(weight.shape)
    return zeros | {"weight_packed": pack_words(codes, bits), "weight_scale": scale, "weight_shape": shape}


def matrix_tensors(matrix: Float[Tensor, "m n"], grid: Grid | None, kept: Kept | None, dtype: torch.dtype) -> Tensors:
    """The tensors that a `StoredMatrix` stores for a matrix's values."""
    if grid is None:
        return {"values": (matrix if kept is None else kept.of(matrix)).to(dtype)}
    assert isinstance(grid.kind, QuantizationArgs)
    bits, codes = grid.kind.num_bits, grid.codes(matrix)
    codes = codes if kept is None else kept.of(codes)
    numbers = codes.view(torch.uint8) if grid.kind.type == "float" else unsigned(codes, bits)
    shares = {} if grid.finer is None else {"shares": (1 / grid.finer).to(dtype)}
    return shares | {"codes": pack_bits(numbers, bits), "scale": grid.step.to(dtype)}


def adapter_tensors(storage: Storage, A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], dtype: torch.dtype) -> Tensors:
    if storage.form == "packed":
        return {"lora_A": A.to(dtype), "lora_B": B.to(dtype)}
    tensors: Tensors = {}
    for name, factor in (("first", A), ("second", B.T)):
        grid = None
        if storage.adapter is not None:
            grid = make_grid(factor, storage.adapter, method="mse", stored=dtype)
        tensors |= below(name, matrix_tensors(factor, grid, None, dtype))
    return tensors


def below(part: str, tensors: Tensors) -> Tensors:
    return {f"{part}.{name}": tensor for name, tensor in tensors.items()}


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank may be
NVFP4 = "nvfp4-pack-quantized"
MADE_ANEW = ("falcon", "gpt_bigcode")  # whose classes initialize linears by hand, which packed ones do not survive


def put_packed(model: nn.Module, packed: Mapping[str, Storage]) -> None:
    """Replace plain linears and tables by empty packed ones, by path, on the meta device."""
    for path, storage in packed.items():
        linear: Any = model.get_submodule(path)
        (m, n), dtype = linear.weight.shape, linear.weight.dtype
        has_bias = getattr(linear, "bias", None) is not None
        with torch.device("meta"):
            model.set_submodule(path, empty_linear(storage, n, m, bias=has_bias, dtype=dtype))


def quantization_config(
    stored: Mapping[str, Storage], untouched: list[str], tables: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write compressed-tensors' config: a group for each way in which linears and tables are stored.

    stored: by path. Where all linears are stored alike their group is of all but the untouched ones. tables: of these
    paths those of embeddings and head, and what engines find them by.
    """
    tables, linears, schemes = tables or {}, dict[Storage, list[str]](), dict[Storage, list[str]]()
    for path, storage in stored.items():
        if path not in tables and (scheme := storage.scheme) is not None:
            linears.setdefault(scheme, []).append(path)
    # Names before classes, or compressed-tensors warns that it did not come to them.
    for path, target in tables.items():
        if (scheme := stored[path].scheme) is not None:
            schemes.setdefault(scheme, []).append(target)
    for scheme, paths in linears.items():
        schemes.setdefault(scheme, []).extend(paths if len(linears) > 1 else ["Linear"])
    groups = [config_group(scheme, targets) for scheme, targets in schemes.items()]
    formats = {group["format"] for group in groups}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": groups[0]["format"] if len(formats) == 1 else "mixed-precision",
        "config_groups": {f"group_{place}": group for place, group in enumerate(groups)},
        "ignore": untouched,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def config_group(storage: Storage, targets: list[str]) -> dict[str, Any]:
    args = storage.weights
    assert args is not None
    name = "int-quantized" if storage.in_bytes else "pack-quantized"
    if args.type == "float":
        name = {None: "float-quantized", FLOAT8: NVFP4}.get(args.scale_dtype, "mxfp4-pack-quantized")
    weights: dict[str, Any] = args.model_dump() | {"dynamic": False}
    if args.scale_dtype is not None:
        dtype = "torch.float8_e4m3fn" if name == NVFP4 else "torch.uint8"
        weights |= {"scale_dtype": dtype, "zp_dtype": dtype}
    inputs = weights | {"num_bits": 8, "symmetric": True, "strategy": "token", "group_size": None, "dynamic": True}
    if args.strategy == "block":
        weights |= {"block_structure": [SIDE, SIDE]}
        inputs |= {"strategy": "group", "group_size": SIDE}
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs if storage.input_activations else None,
        "output_activations": None,
        "format": name,
    }


def unpacks_while_loading(storage: Storage, model_type: str) -> bool:
    """Whether transformers has to unpack the weights while it loads them.

    It has no room for packed zero points, makes the weights of some classes anew before it has them, and leaves 4-bit
    floats in bfloat16 once they are unpacked, whatever the model is in.
    """
    weights = storage.weights
    if storage.form != "packed" or weights is None or storage.in_bytes:
        return False
    return storage.in_float4 or not weights.symmetric or model_type in MADE_ANEW


def not_for_vllm(storage: Storage, largest_rank: int) -> str | None:
    """Why vLLM's kernels cannot run packed linears of this kind; None where they can."""
    if largest_rank > VLLM_RANKS[-1]:
        return f"its adapters have a rank of {VLLM_RANKS[-1]} at most"
    if (weights := storage.weights) is None:
        return None
    if weights.strategy == "tensor" and not storage.in_bytes:
        return "its packed integers have a scale a channel or a group"
    if storage.in_bytes and weights.type == "float" and weights.group_size is not None:
        return "its fp8 weights have a scale a channel or a tensor"
    if storage.input_activations is not None and not storage.in_bytes:
        return "it rounds inputs beside 8-bit weights alone"
    return None


def embeddings_not_for_vllm(storage: Storage, *, is_tied: bool) -> str | None:
    """Why vLLM does not load embeddings that are packed so; None where it does."""
    if is_tied:
        return "there a table that is embeddings and head is not in few bits"
    weights = storage.weights
    if weights is None or weights.num_bits not in (2, 4, 8) or not weights.symmetric:
        return "it looks embeddings up in symmetric integers of 2, 4 or 8 bits"
    return None


def lacks_cpu_kernel(storage: Storage) -> str | None:
    """Which packed weights vLLM 0.32 runs on GPUs alone (docs/engines.md); None where its CPU build has a kernel."""
    weights = storage.weights
    if weights is not None and weights.strategy == "block":
        return "fp8 by blocks on CPUs without AMX"
    if weights is None or storage.input_activations is not None:
        return None
    if weights.type == "float":
        return "fp8 weights beside 16-bit inputs" if storage.in_bytes else "4-bit floats"
    return f"{weights.num_bits}-bit integers{' on CPUs without AVX-512' if weights.num_bits == 4 else ''}"
