"""A model whose linears are stored in fewer bits: for the engines people use, or as small as we can.

packed: the dense model's own class, its linears as compressed-tensors reads them and the adapter as a folder that PEFT
and vLLM read. Compressed-tensors' own sparse formats are left alone: engines have dropped them, and refuse a
checkpoint that has a `sparsity_config`.

compact: our own architecture around what the model would be written as otherwise.
"""

import copy
import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compress.checkpoints.adapter import VLLM_RANKS
from compress.checkpoints.targets import Shape, Target, special_tokens
from compress.checkpoints.wrapped import INNER, WrappedLayout, WrappedTarget
from compress.models.configuration_compact import CompactConfig
from compress.models.modeling_sliced import replace
from compress.models.storage import Storage, empty_linear
from compress.streaming.layout import Layout

MADE_ANEW = ("falcon", "gpt_bigcode")  # whose classes initialise linears by hand, which packed ones do not survive
ADAPTER_PREFIX = "base_model.model."  # what PEFT calls the model that an adapter is for
LORA = (".lora_A", ".lora_B")
# What the modules of the compact architectures are called by, for each start of their classes' names.
MODULES = {
    "Compact": "compact",
    "CompactSliced": "compact_sliced",
    "CompactLowRank": "compact_lowrank",
    "CompactLowRankSliced": "compact_lowrank_sliced",
}


@dataclass(frozen=True)
class PackedTarget(WrappedTarget):
    def config(self, shape: Shape, dtype: torch.dtype) -> Any:
        config = self.base.config(shape, dtype)
        storage = next(iter(shape.storage.values()))
        if storage.bits is not None:
            config.quantization_config = quantization_config(storage, self._untouched(shape))
        return config

    def _untouched(self, shape: Shape) -> list[str]:
        """The linears that stay as they are."""
        modules, stored = self.base.model(shape).named_modules(), written_storage(self.base, shape)
        return [name for name, module in modules if isinstance(module, nn.Linear) and name not in stored]

    def model(self, shape: Shape, *, num_blocks: int | None = None) -> PreTrainedModel:
        model = self.base.model(shape, num_blocks=num_blocks)
        for path, storage in written_storage(self.base, shape).items():
            linear = model.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            has_bias, dtype = linear.bias is not None, linear.weight.dtype
            with torch.device("meta"):
                stored = empty_linear(storage, linear.in_features, linear.out_features, bias=has_bias, dtype=dtype)
            replace(model, path, stored)
        return model

    def layout(self, dtype: torch.dtype) -> Layout:
        return PackedLayout(self.base.layout(dtype))


@dataclass(frozen=True)
class PackedLayout(WrappedLayout):
    def in_adapter(self, name: str) -> str | None:
        return f"{ADAPTER_PREFIX}{self.written(name)}.weight" if name.endswith(LORA) else None


def written_storage(base: Target, shape: Shape) -> dict[str, Storage]:
    """By the linears' paths in the class that is written."""
    written = base.layout(torch.float32).written
    return {written(path): storage for path, storage in shape.storage.items()}


def quantization_config(storage: Storage, untouched: list[str]) -> dict[str, Any]:
    """What compressed-tensors reads; one group of linears, all alike."""
    kind = "float" if storage.floating else "int"
    strategy = storage.group if isinstance(storage.group, str) else "group"
    weights = {
        "num_bits": storage.bits,
        "type": kind,
        "symmetric": storage.symmetric,
        "strategy": strategy,
        "group_size": storage.group if strategy == "group" else None,
        "dynamic": False,
    }
    inputs = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "group_size": None, "dynamic": True}
    name = storage_format(storage)
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
    """Whether transformers can read packed weights only so, which gives them in the dtype that is stored.

    It has no room for packed zero points, and makes the weights of some classes anew before it has them.
    """
    awkward = not storage.symmetric or model_type in MADE_ANEW
    return storage.form == "packed" and storage_format(storage) == "pack-quantized" and awkward


def not_for_vllm(storage: Storage, largest_rank: int) -> str | None:
    """Why vLLM's kernels do not take packed linears of this kind; None where they do."""
    if largest_rank > VLLM_RANKS[-1]:
        return f"its adapters have a rank of {VLLM_RANKS[-1]} at most"
    if storage.bits is None:
        return None
    if storage.group == "tensor" and not storage.in_bytes:
        return "its packed integers have a scale a channel or a group"
    if storage.floating and isinstance(storage.group, int):
        return "its fp8 weights have a scale a channel or a tensor"
    if storage.inputs is not None and not storage.in_bytes:
        return "it rounds inputs beside 8-bit weights alone"
    return None


def storage_format(storage: Storage) -> str:
    if storage.floating:
        return "float-quantized"
    return "int-quantized" if storage.in_bytes else "pack-quantized"


@dataclass(frozen=True)
class CompactTarget(WrappedTarget):
    @property
    def architecture(self) -> str:
        return f"{self.kind}ForCausalLM"

    @property
    def kind(self) -> str:
        """How the names of its classes begin: what it is built around has to be named in them."""
        return "Compact" if self.base.is_stock else "Compact" + self.base.architecture.removesuffix("ForCausalLM")

    @property
    def is_stock(self) -> bool:
        return False

    @property
    def carried(self) -> tuple[str, ...]:
        own = ("configuration_compact", "modeling_compact")
        beside = tuple(f"{part}_{MODULES[self.kind]}" for part in ("configuration", "modeling"))
        experts = ("modeling_experts",)
        return (*own, *experts) if self.base.is_stock else (*own, *beside, *self.base.carried)

    def config(self, shape: Shape, dtype: torch.dtype) -> Any:
        base = self.base.config(shape, dtype)
        linears = self.base.model(shape)
        entries = {
            path: storage.entry(bias=getattr(linears.get_submodule(path), "bias", None) is not None)
            for path, storage in written_storage(self.base, shape).items()
        }
        config_class: type[CompactConfig] = getattr(self.module("configuration"), f"{self.kind}Config")
        config = config_class(
            text_config=copy.deepcopy(base),
            linears=entries,
            architectures=[self.architecture],
            auto_map={
                "AutoConfig": f"configuration_{MODULES[self.kind]}.{config_class.__name__}",
                "AutoModelForCausalLM": f"modeling_{MODULES[self.kind]}.{self.architecture}",
            },
            **special_tokens(base),
        )
        config.dtype = dtype
        return config

    def model(self, shape: Shape, *, num_blocks: int | None = None) -> PreTrainedModel:
        model_class = getattr(self.module("modeling"), self.architecture)
        with torch.device("meta"):
            model: PreTrainedModel = model_class(self.config(shape, torch.float32))
        model.tie_weights()
        return model

    def module(self, part: str) -> ModuleType:
        return importlib.import_module(f"compress.models.{part}_{MODULES[self.kind]}")

    def layout(self, dtype: torch.dtype) -> Layout:
        return WrappedLayout(self.base.layout(dtype), INNER)
