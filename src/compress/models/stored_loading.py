"""Load a folder with quantized linears, a LoRA adapter or both, keeping them as they are stored; and a GGUF file.

The folder is what compressed-tensors and PEFT read; neither has to be installed. No weight is ever dense: the model is
built without its parameters, its linears become those of `models/packed.py`, and these get the tensors of the files.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from compress.errors import CheckpointError
from compress.models.hub import find_model
from compress.models.int4 import use_kernels
from compress.models.loading import load_config, load_model
from compress.models.storage import Storage, empty_linear
from compress.models.stored_files import ADAPTER, METHOD, Lora, StoredTensors, read_lora, read_scheme
from compress.models.tensor_files import gguf_of
from compress.models.untrusted import read_json, reading

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_stored(folder: Path) -> bool:
    """Whether a checkpoint has linears that compressed-tensors quantized or an adapter beside it, or is a GGUF file."""
    if gguf_of(folder) is not None:
        return True
    config = folder / "config.json"
    if not config.is_file():
        return False
    found = read_json(config).get("quantization_config")
    by_compressed_tensors = isinstance(found, dict) and found.get("quant_method") == METHOD
    return by_compressed_tensors or (folder / ADAPTER).is_dir()


def load_stored(folder: Path, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load a model. Safetensors only; every tensor must be there and have its place."""
    scheme, lora = read_scheme(folder), read_lora(folder)
    tensors = StoredTensors(folder, lora)
    model = hollow_model(folder, dtype)
    put_linears(model, scheme, tensors, dtype)
    fill(model, tensors, dtype, device)
    if lora is not None:
        scale_adapters(model, lora)
    give_generation_config(model, folder)
    anything: Any = model  # to its decorator `to` is no method
    anything.to(device).eval()
    use_kernels(model)
    return model


def give_generation_config(model: PreTrainedModel, folder: Path) -> None:
    if (folder / "generation_config.json").is_file():
        with reading(f"The generation_config.json of {folder} cannot be read", "Delete it or get it again."):
            model.generation_config = GenerationConfig.from_pretrained(folder)


def hollow_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Build the dense model with parameters on the meta device and real buffers."""
    config = load_config(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # no library is to act on it
    said = f"The config.json of {folder} makes no model"
    with reading(said), no_init_weights(), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def put_linears(model: nn.Module, scheme: Storage | None, tensors: StoredTensors, dtype: torch.dtype) -> None:
    """Replace linears that are quantized or have an adapter by modules that hold what is stored."""
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    for path, linear in linears.items():
        quantized, adapted = tensors.find(f"{path}.weight_scale"), tensors.find(f"{path}.lora_A")
        if not quantized and not adapted:
            continue
        storage = scheme if quantized else Storage("packed", None)
        if storage is None:
            raise CheckpointError(
                f"{tensors.folder} has quantized weights ({path}), but its config.json no quantization_config. "
                "Get it again."
            )
        if isinstance(storage.group, int) and linear.in_features % storage.group:
            raise CheckpointError(
                f"The {linear.in_features} inputs of {path} do not divide into the groups of {storage.group} that "
                "config.json says. The checkpoint is damaged: get it again."
            )
        storage = replace(storage, rank=tensors.tensors[adapted].shape[0] if adapted else 0)
        with torch.device("meta"):
            has_bias = linear.bias is not None
            put = empty_linear(storage, linear.in_features, linear.out_features, bias=has_bias, dtype=dtype)
        model.set_submodule(path, put)


def fill(model: PreTrainedModel, tensors: StoredTensors, dtype: torch.dtype, device: torch.device) -> None:
    """Load the stored tensors, integers as they are and floats in the dtype."""
    tied, expected = set(model.all_tied_weights_keys), model.state_dict()
    places = {name: stored for name in expected if (stored := tensors.find(name)) is not None}
    missing = [name for name in expected if name not in places and name not in tied and expected[name].is_meta]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise CheckpointError(
            f"The checkpoint {tensors.folder} lacks {len(missing)} tensors of its model: {shown}. Get it again."
        )
    unknown = tensors.tensors.keys() - set(places.values())
    if unknown:
        raise CheckpointError(
            f"The checkpoint {tensors.folder} has {min(unknown)!r}, which has no place in its model. "
            "Load it with transformers and compressed-tensors."
        )
    for name, tensor in tensors.read(places):
        check(name, tensor, expected[name])
        owner, attribute = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if attribute == "weight_shape" and tensor.tolist() != [owner.out_features, owner.in_features]:
            raise CheckpointError(
                f"{name!r} says {tensor.tolist()}, which config.json does not. Get the checkpoint again."
            )
        value = tensor.to(device, dtype) if tensor.dtype in FLOATS else tensor.to(device)
        is_parameter = attribute in dict(owner.named_parameters(recurse=False))
        setattr(owner, attribute, nn.Parameter(value, requires_grad=False) if is_parameter else value)
    model.tie_weights()


def check(name: str, tensor: Tensor, expected: Tensor) -> None:
    kinds = FLOATS if expected.dtype in FLOATS else (expected.dtype,)
    if tensor.shape != expected.shape or tensor.dtype not in kinds:
        raise CheckpointError(
            f"The tensor {name!r} is {described(tensor)}, but config.json says {described(expected)}. "
            "The checkpoint is damaged: get it again."
        )


def described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def scale_adapters(model: nn.Module, lora: Lora) -> None:
    """Fold PEFT's scale into the adapter's second factor."""
    for path, module in model.named_modules():
        factors = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
        if factors[0] is not None and factors[1] is not None:
            factors[1].data *= lora.factor(path, len(factors[0]))


def open_model(
    folder: Path, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a model. Checkpoints of ours stay packed in memory, adapter included; others are loaded by transformers."""
    if gguf_of(folder) is not None or ((folder / "compress.json").is_file() and is_stored(folder)):
        return load_stored(folder, dtype=dtype, device=device)
    return load_model(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)


def load(model: str, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
    """
    model: a folder, a hub id or an alias. dtype: by default the checkpoint's own.
    """
    folder = find_model(model).whole_folder()
    own: torch.dtype = getattr(load_config(folder), "dtype", None) or torch.float32
    return open_model(folder, dtype=dtype or own, device=device)
