"""Read how a checkpoint stores its linears: compressed-tensors' scheme, PEFT's adapter, the tensors.

Read without compressed-tensors and peft, and no more than what `models/packed.py` can hold; anything else is refused.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import CheckpointError
from compress.models.storage import Storage
from compress.models.tensor_files import SafetensorsFolder, read_header
from compress.models.untrusted import read_json
from compress.numerics.grids import Granularity

METHOD = "compressed-tensors"
ADAPTER = "adapter"
LORA_NAME = re.compile(r"base_model\.model\.(.+)\.(lora_[AB])\.weight")
BEYOND = ("kv_cache_scheme", "transform_config", "sparsity_config", "output_activations")
# What makes more of a LoRA than two factors and a factor before them.
LORA_EXTRAS = (
    "use_dora",
    "use_rslora",
    "use_qalora",
    "fan_in_fan_out",
    "layer_replication",
    "alora_invocation_tokens",
    "trainable_token_indices",
)


def read_scheme(folder: Path) -> Storage | None:
    """Read the quantization scheme from config.json; None where there is none."""
    found = read_json(folder / "config.json").get("quantization_config")
    if found is None:
        return None
    try:
        return scheme(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise CheckpointError(
            f"The quantization_config of {folder} cannot be read: {reason}. "
            "Load it with transformers and compressed-tensors."
        ) from error


def scheme(found: dict[str, Any]) -> Storage:
    """Raises ValueError for what is not understood, and what a damaged config makes of the look-ups."""
    if found["quant_method"] != METHOD:
        raise ValueError(f"quant_method is {found['quant_method']!r}, not {METHOD!r}")
    if len(found["config_groups"]) != 1:
        raise ValueError("it has more than one config group, or none")
    (group,) = found["config_groups"].values()
    beyond = [key for key in BEYOND if found.get(key) or group.get(key)]
    if beyond:
        raise ValueError(f"it has {beyond[0]}")
    weights = group["weights"]
    bits, kind = weights["num_bits"], weights["type"]
    if kind not in ("int", "float") or bits not in range(2, 9) or weights.get("dynamic"):
        raise ValueError(f"weights are {bits}-bit {kind!r}")
    return Storage(
        "packed",
        bits,
        floating=kind == "float",
        group=granularity(weights),
        symmetric=bool(weights.get("symmetric", True)),
        inputs=None if group.get("input_activations") is None else inputs(group["input_activations"]),
    )


def granularity(weights: dict[str, Any]) -> Granularity:
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy == "tensor" or strategy == "channel":
        return strategy
    if strategy == "group" and isinstance(size, int) and size > 0:
        return size
    raise ValueError(f"the strategy of weights is {strategy!r}")


def inputs(found: dict[str, Any]) -> Any:
    facts = {key: found.get(key) for key in ("num_bits", "symmetric", "dynamic", "strategy")}
    if facts != {"num_bits": 8, "symmetric": True, "dynamic": True, "strategy": "token"}:
        raise ValueError("inputs are rounded in another way than to 8 bits, each token's for itself as it comes")
    return {"float": "fp8", "int": "int8"}[found["type"]]


@dataclass(frozen=True)
class Lora:
    """
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
    matches = {tensor.name: LORA_NAME.fullmatch(tensor.name) for tensor in read_header(file)}
    names = {f"{match[1]}.{match[2]}": name for name, match in matches.items() if match is not None}
    if len(names) < len(matches):
        other = next(name for name, match in matches.items() if match is None)
        raise CheckpointError(f"{file} has {other!r}, which is no factor of a LoRA. Load it with peft.")
    try:
        alphas = {str(end): float(alpha) for end, alpha in (config.get("alpha_pattern") or {}).items()}
        lora = Lora(file, names, float(config["lora_alpha"]), alphas)
        lora.factor("", 1)  # compiles the patterns
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise CheckpointError(
            f"The alphas of {config_file} cannot be read ({error}). Write the adapter again."
        ) from error
    return lora


class StoredTensors(SafetensorsFolder):
    """Tensors of a model's files and its adapter, by their names in a model of stored linears."""

    def __init__(self, folder: Path, lora: Lora | None) -> None:
        super().__init__(folder)
        if lora is not None:
            self.add(lora.file, {stored: name for name, stored in lora.names.items()})
