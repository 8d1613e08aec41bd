"""Packed linears as compressed-tensors reads them, with a LoRA adapter that PEFT and vLLM read.

Compressed-tensors' own sparse formats are left alone: engines have dropped them, and refuse a checkpoint that has a
`sparsity_config`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from compress.models.storage import Storage, empty_linear
from compress.numerics.grids import BLOCK, SIDE

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


def quantization_config(storage: Storage, untouched: list[str]) -> dict[str, Any]:
    """Write compressed-tensors' config: one group of linears, all alike."""
    kind, name = "float" if storage.floating else "int", storage_format(storage)
    strategy = storage.group if isinstance(storage.group, str) else "group"
    weights: dict[str, Any] = {
        "num_bits": storage.bits,
        "type": kind,
        "symmetric": storage.symmetric,
        "strategy": strategy,
        "group_size": storage.group if strategy == "group" else None,
        "dynamic": False,
    }
    if storage.in_float4:
        dtype = "torch.float8_e4m3fn" if name == NVFP4 else "torch.uint8"
        weights |= {"strategy": "tensor_group" if name == NVFP4 else "group", "scale_dtype": dtype, "zp_dtype": dtype}
    inputs = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "group_size": None, "dynamic": True}
    if storage.group == BLOCK:
        weights |= {"strategy": "block", "block_structure": [SIDE, SIDE]}
        inputs |= {"strategy": "group", "group_size": SIDE}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs if storage.inputs else None,
        "output_activations": None,
        "format": name,
    }
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": name,
        "config_groups": {"group_0": group},
        "ignore": untouched,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def unpacks_while_loading(storage: Storage, model_type: str) -> bool:
    """Whether transformers has to unpack the weights while it loads them.

    It has no room for packed zero points, makes the weights of some classes anew before it has them, and leaves 4-bit
    floats in bfloat16 once they are unpacked, whatever the model is in.
    """
    awkward = not storage.symmetric or model_type in MADE_ANEW
    is_packed = storage.form == "packed" and storage.bits is not None and not storage.in_bytes
    return storage.in_float4 or (is_packed and awkward)


def not_for_vllm(storage: Storage, largest_rank: int) -> str | None:
    """Why vLLM's kernels cannot run packed linears of this kind; None where they can."""
    if largest_rank > VLLM_RANKS[-1]:
        return f"its adapters have a rank of {VLLM_RANKS[-1]} at most"
    if storage.bits is None:
        return None
    if storage.group == "tensor" and not storage.in_bytes:
        return "its packed integers have a scale a channel or a group"
    if storage.in_bytes and storage.floating and isinstance(storage.group, int):
        return "its fp8 weights have a scale a channel or a tensor"
    if storage.inputs is not None and not storage.in_bytes:
        return "it rounds inputs beside 8-bit weights alone"
    return None


def storage_format(storage: Storage) -> str:
    if storage.in_float4:
        return NVFP4 if storage.group == 16 else "mxfp4-pack-quantized"
    if storage.floating:
        return "float-quantized"
    return "int-quantized" if storage.in_bytes else "pack-quantized"
