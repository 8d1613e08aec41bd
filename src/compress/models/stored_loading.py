"""Load a folder with quantized linears, a LoRA adapter or both, keeping them as they are stored; and a GGUF file.

The folder is what compressed-tensors and PEFT read; neither has to be installed. No weight is ever dense: the model is
built without its parameters, its linears become those of `models/storage.py`, and these get the tensors of the files.
What is more than these can hold is refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from compress.errors import CheckpointError
from compress.models.hub import find_model
from compress.models.int4 import use_kernels
from compress.models.loading import hollow_model, load_config, load_model
from compress.models.storage import LoraLinear, Storage, empty_linear
from compress.models.tensor_files import ADAPTER, SafetensorsFolder, gguf_of, read_header
from compress.models.untrusted import read_json, reading, shown
from compress.numerics.grids import SIDE, QuantizationArgs
from compress.own_model.modeling_compress import AdaptedLinear

METHOD = "compressed-tensors"
KINDS = ("Linear", "Embedding")  # targets that are classes; others are names
LORA_NAME = re.compile(r"base_model\.model\.(.+)\.(lora_[AB])\.weight")
BEYOND = ("kv_cache_scheme", "transform_config", "sparsity_config", "output_activations")
# What makes more of a LoRA than two factors and a factor before them.
LORA_EXTRAS = (
    *("use_dora", "use_rslora", "use_qalora", "fan_in_fan_out"),
    *("layer_replication", "alora_invocation_tokens", "trainable_token_indices"),
)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_schemes(folder: Path) -> dict[str, Storage]:
    """Read the quantization schemes from config.json, by their targets: `Linear`, `Embedding`, the path of a head."""
    found = read_json(folder / "config.json").get("quantization_config")
    if found is None:
        return {}
    try:
        return schemes(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise CheckpointError(
            f"The quantization_config of {folder} cannot be read: {reason}. "
            "Load it with transformers and compressed-tensors."
        ) from error


def schemes(found: dict[str, Any]) -> dict[str, Storage]:
    """Raises ValueError for what is not understood, and what a damaged config makes of the look-ups."""
    if found["quant_method"] != METHOD:
        raise ValueError(f"quant_method is {found['quant_method']!r}, not {METHOD!r}")
    groups = [*found["config_groups"].values()]
    targets = {str(target): scheme(found, group) for group in groups for target in group["targets"]}
    if not targets:
        raise ValueError("it has no config group")
    if len({*targets.values()}) == 1:
        return dict.fromkeys(KINDS, next(iter(targets.values())))
    if any(target.startswith("re:") for target in targets):
        raise ValueError("it has several config groups, and targets that are no names")
    return targets


def scheme(found: dict[str, Any], group: dict[str, Any]) -> Storage:
    beyond = [key for key in BEYOND if found.get(key) or group.get(key)]
    if beyond:
        raise ValueError(f"it has {beyond[0]}")
    weights, inputs = group["weights"], group.get("input_activations")
    try:
        args = QuantizationArgs(**{key: weights[key] for key in QuantizationArgs.model_fields if key in weights})
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"of weights {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    is_block = args.strategy == "block"
    if weights.get("dynamic") or is_block != (weights.get("block_structure") == [SIDE, SIDE]):
        raise ValueError("weights have scales that are found as they run, or of blocks that are not 128 x 128")
    if inputs is not None:
        facts = {key: inputs.get(key) for key in ("num_bits", "symmetric", "dynamic", "strategy")}
        each = {"strategy": "group", "group_size": SIDE} if is_block else {"strategy": "token"}
        facts |= {"group_size": inputs.get("group_size")} if is_block else {}
        if facts != {"num_bits": 8, "symmetric": True, "dynamic": True, **each}:
            raise ValueError("inputs are rounded in another way than to 8 bits, each token's for itself as it comes")
    return Storage(
        "packed",
        args,
        input_activations=None if inputs is None else {"float": "fp8", "int": "int8"}[inputs["type"]],  # type: ignore[arg-type]
    )


@dataclass(frozen=True)
class Lora:
    """The LoRA adapter beside a checkpoint.

    names: by a parameter's name in a model (`path.lora_A`) that in the file. alpha, alphas: a product is multiplied by
    the one and divided by the rank; paths that end as a pattern says have their own.
    """

    file: Path
    names: dict[str, str]
    alpha: float
    alphas: dict[str, float]

    def factor(self, path: str, rank: int) -> float:
        """The scale of a linear's adapter, as PEFT computes it."""
        own = (alpha for end, alpha in self.alphas.items() if re.match(rf"(.*\.)?({end})$", path))
        return next(own, self.alpha) / rank


def read_lora(folder: Path) -> Lora | None:
    """Read a model's LoRA adapter; None where there is none."""
    if not (folder / ADAPTER).is_dir():
        return None
    config_file, file = folder / ADAPTER / "adapter_config.json", folder / ADAPTER / "adapter_model.safetensors"
    config = read_json(config_file)
    extras = [key for key in LORA_EXTRAS if config.get(key)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or extras:
        what = extras[0] if extras else "its peft_type or bias"
        raise CheckpointError(f"{config_file} is no plain LoRA ({what}). Load it with peft.")
    names = {}
    for tensor in read_header(file):
        match = LORA_NAME.fullmatch(tensor.name)
        if match is None:
            raise CheckpointError(f"{file} has {tensor.name!r}, which is no factor of a LoRA. Load it with peft.")
        names[f"{match[1]}.{match[2]}"] = tensor.name
    try:
        alphas = {str(end): float(alpha) for end, alpha in (config.get("alpha_pattern") or {}).items()}
        lora = Lora(file, names, float(config["lora_alpha"]), alphas)
        lora.factor("", 1)  # compiles the patterns
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise CheckpointError(
            f"The alphas of {config_file} cannot be read ({error}). Write the adapter again."
        ) from error
    return lora


def stored_tensors(folder: Path, lora: Lora | None) -> SafetensorsFolder:
    """The tensors of a model's files and its adapter, by their names in a model of stored linears."""
    found = SafetensorsFolder(folder)
    if lora is not None:
        found.add(lora.file, {stored: name for name, stored in lora.names.items()})
    return found


def is_stored(folder: Path) -> bool:
    """Whether a checkpoint has linears that compressed-tensors quantized or an adapter beside it, or is a GGUF file."""
    if gguf_of(folder) is not None:
        return True
    if not (folder / "config.json").is_file():
        return False
    found = read_json(folder / "config.json").get("quantization_config")
    return (folder / ADAPTER).is_dir() or (isinstance(found, dict) and found.get("quant_method") == METHOD)


def load_stored(folder: Path, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load a model. Safetensors only; every tensor must be there and have its place."""
    quantized, lora = read_schemes(folder), read_lora(folder)
    tensors = stored_tensors(folder, lora)
    config = load_config(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # no library is to act on it
    model: Any = hollow_model(config, dtype, f"The config.json of {folder} makes no model")
    tables = put_tables(model, quantized, tensors, dtype)
    put_linears(model, quantized, tensors, dtype)
    fill(model, tensors, dtype, device)
    unpack_tables(model, tables, dtype)
    for path, linear in model.named_modules():
        if lora is not None and isinstance(linear, LoraLinear) and linear.lora_B is not None:
            linear.lora_B.data *= lora.factor(path, linear.lora_B.shape[1])
    if (folder / "generation_config.json").is_file():
        with reading(f"The generation_config.json of {folder} cannot be read", "Delete it or get it again."):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    model.to(device).eval()
    use_kernels(model)
    return model


def put_tables(
    model: PreTrainedModel, quantized: Mapping[str, Storage], tensors: SafetensorsFolder, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """Replace embeddings that are quantized by modules that hold what is stored, a head that is tied to them by none.

    The modules that were there, by path.
    """
    kept = dict[str, nn.Module]()
    for path, table in list(model.named_modules()):
        if not isinstance(table, nn.Embedding) or tensors.find(f"{path}.weight_scale") is None:
            continue
        storage = stored_as(path, quantized, table.embedding_dim, "Embedding", tensors)
        with torch.device("meta"):
            put = empty_linear(storage, table.embedding_dim, table.num_embeddings, bias=False, dtype=dtype)
        tied = [head for head, of in model.all_tied_weights_keys.items() if of == f"{path}.weight"]
        for name in (head.removesuffix(".weight") for head in tied):
            kept[name] = model.get_submodule(name)
            model.set_submodule(name, nn.Identity())
        kept[path] = table
        model.set_submodule(path, put)
    return kept


def unpack_tables(model: PreTrainedModel, kept: Mapping[str, nn.Module], dtype: torch.dtype) -> None:
    """Put the modules back that stored embeddings have taken the place of, with their weights in full."""
    for path, module in kept.items():
        stored = model.get_submodule(path)
        if isinstance(stored, AdaptedLinear):
            module.weight = nn.Parameter(stored.rows(0, stored.out_features, dtype), requires_grad=False)
        model.set_submodule(path, module)
    model.tie_weights()


def stored_as(
    path: str, quantized: Mapping[str, Storage], inputs: int, kind: str, tensors: SafetensorsFolder
) -> Storage:
    """The scheme of a matrix that is stored in few bits. Raises CheckpointError for none that fits it."""
    storage = quantized.get(path, quantized.get(kind))
    if storage is None:
        raise CheckpointError(
            f"{tensors.folder} has quantized weights ({path}), but its config.json no quantization_config for them. "
            "Get it again."
        )
    weights = storage.weights or QuantizationArgs()
    size = SIDE if weights.strategy == "block" else weights.group_size
    if size is not None and inputs % size:
        raise CheckpointError(
            f"The {inputs} inputs of {path} do not divide into the groups of {size} that config.json says. The "
            "checkpoint is damaged: get it again."
        )
    return storage


def put_linears(
    model: nn.Module, quantized: Mapping[str, Storage], tensors: SafetensorsFolder, dtype: torch.dtype
) -> None:
    """Replace linears that are quantized or have an adapter by modules that hold what is stored."""
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    for path, linear in linears.items():
        is_quantized, adapter = tensors.find(f"{path}.weight_scale") is not None, tensors.find(f"{path}.lora_A")
        if not is_quantized and adapter is None:
            continue
        storage = Storage("packed")
        if is_quantized:
            storage = stored_as(path, quantized, linear.in_features, "Linear", tensors)
        storage = replace(storage, rank=0 if adapter is None else tensors.tensors[adapter].shape[0])
        with torch.device("meta"):
            has_bias = linear.bias is not None
            put = empty_linear(storage, linear.in_features, linear.out_features, bias=has_bias, dtype=dtype)
        model.set_submodule(path, put)


def fill(model: PreTrainedModel, tensors: SafetensorsFolder, dtype: torch.dtype, device: torch.device) -> None:
    """Load the stored tensors, integers as they are and floats in the dtype."""
    tied, expected = set(model.all_tied_weights_keys), model.state_dict()
    places = {name: stored for name in expected if (stored := tensors.find(name)) is not None}
    missing = [name for name in expected if name not in places and name not in tied and expected[name].is_meta]
    if missing:
        raise CheckpointError(
            f"The checkpoint {tensors.folder} lacks {len(missing)} tensors of its model: {shown(missing)}. "
            "Get it again."
        )
    unknown = tensors.tensors.keys() - set(places.values())
    if unknown:
        raise CheckpointError(
            f"The checkpoint {tensors.folder} has {min(unknown)!r}, which has no place in its model. "
            "Load it with transformers and compressed-tensors."
        )
    for name, tensor in tensors.read(places):
        kinds = FLOATS if expected[name].dtype in FLOATS else (expected[name].dtype,)
        if tensor.shape != expected[name].shape or tensor.dtype not in kinds:
            found, said = (
                f"{str(each.dtype).removeprefix('torch.')} {list(each.shape)}" for each in (tensor, expected[name])
            )
            raise CheckpointError(
                f"The tensor {name!r} is {found}, but config.json says {said}. The checkpoint is damaged: get it again."
            )
        owner, attribute = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if attribute == "weight_shape" and tensor.tolist() != [owner.out_features, owner.in_features]:
            raise CheckpointError(
                f"{name!r} says {tensor.tolist()}, which config.json does not. Get the checkpoint again."
            )
        is_fixed = attribute in getattr(owner, "as_stored", ()) or tensor.dtype not in FLOATS
        value = tensor.to(device) if is_fixed else tensor.to(device, dtype)
        is_parameter = attribute in dict(owner.named_parameters(recurse=False))
        setattr(owner, attribute, nn.Parameter(value, requires_grad=False) if is_parameter else value)


def open_model(
    folder: Path, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a model. Checkpoints of ours stay packed in memory, adapter included; others are loaded by transformers."""
    if gguf_of(folder) is not None or ((folder / "compress.json").is_file() and is_stored(folder)):
        return load_stored(folder, dtype=dtype, device=device)
    return load_model(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)


def load(model: str, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
    """Load a model. model: a folder, a hub id or an alias. dtype: by default the checkpoint's own."""
    folder = find_model(model).whole_folder()
    own: torch.dtype = getattr(load_config(folder), "dtype", None) or torch.float32
    return open_model(folder, dtype=dtype or own, device=device)
