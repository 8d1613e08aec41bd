"""LoRA on linears, by PEFT: merged into their weights at the end, or kept as an adapter beside them.

Linears that are stored in few bits are none that PEFT knows, but have room for an adapter of their own
(`models/packed.py`); it begins as PEFT's do, A drawn at random and B zero.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.models.packed import LoraLinear

ADAPTER_NAME = "default"  # PEFT's


@dataclass(frozen=True)
class Settled:
    """What training has come to, by the model's own names, in the dtype it was computed in.

    tensors: in place of those that the files have. adapter: a new one beside them, `PATH.lora_A` (r, n) and
        `PATH.lora_B` (m, r), to be multiplied by nothing else.
    """

    tensors: Mapping[str, Tensor]
    adapter: Mapping[str, Tensor]


class Lora:
    """
    model: with what is trained in it. parameters: that, by name.
    """

    def __init__(
        self, model: PreTrainedModel, linears: Mapping[str, nn.Module], *, rank: int, alpha: int, merge: bool
    ) -> None:
        """
        linears: plain ones, by their paths in the model.
        """
        from peft import LoraConfig, inject_adapter_in_model

        model.requires_grad_(False)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(linears))
        self.model: Any = inject_adapter_in_model(config, model, ADAPTER_NAME)
        self.merge = merge
        self.layers = {path: model.get_submodule(path) for path in linears}
        self.parameters = {
            name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad
        }
        for parameter in self.parameters.values():
            parameter.data = parameter.data.float() if parameter.dtype.itemsize < 4 else parameter.data

    @torch.no_grad()
    def settled(self) -> Settled:
        if self.merge:
            return Settled({f"{path}.weight": merged(layer) for path, layer in self.layers.items()}, {})
        adapter: dict[str, Tensor] = {}
        for path, layer in self.layers.items():
            A, B, scale = factors(layer)
            adapter |= {f"{path}.lora_A": A, f"{path}.lora_B": scale * B}
        return Settled({}, adapter)


def factors(layer: Any) -> tuple[Tensor, Tensor, float]:
    """Of one of PEFT's layers: A (r, n), B (m, r), and what their product is multiplied by."""
    return layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight, layer.scaling[ADAPTER_NAME]


def merged(layer: Any) -> Tensor:
    """W + scale B A, in float32 at least."""
    A, B, scale = factors(layer)
    return layer.base_layer.weight.to(A.dtype) + scale * (B @ A)


class StoredLora:
    """A new adapter on linears that are stored in few bits."""

    def __init__(self, model: PreTrainedModel, linears: Mapping[str, LoraLinear], *, rank: int, alpha: int) -> None:
        model.requires_grad_(False)
        self.model: Any = model
        self.scale = alpha / rank
        self.parameters: dict[str, nn.Parameter] = {}
        for path, linear in linears.items():
            device = next(iter(linear.buffers())).device
            A = torch.empty(rank, linear.in_features)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            # The scale is in A, so that what is written needs none.
            linear.lora_A = nn.Parameter(self.scale * A.to(device))
            linear.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
            self.parameters |= {f"{path}.lora_A": linear.lora_A, f"{path}.lora_B": linear.lora_B}

    @torch.no_grad()
    def settled(self) -> Settled:
        return Settled({}, {name: parameter.detach() for name, parameter in self.parameters.items()})
