"""LoRA on linears (arXiv 2106.09685): merged into their weights at the end, or kept as an adapter beside them.

It begins and is scaled as PEFT's: A drawn at random, B zero, their product multiplied by alpha / rank.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.models.packed import LoraLinear
from compress.tuning.linears import FloatAdapterLinear


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
        self,
        model: PreTrainedModel,
        linears: Mapping[str, nn.Linear | LoraLinear],
        *,
        rank: int,
        alpha: int,
        merge: bool,
    ) -> None:
        """
        linears: by their paths in the model; to be merged they must be plain ones.
        """
        model.requires_grad_(False)
        self.model: Any = model
        self.merge = merge
        self.layers: dict[str, FloatAdapterLinear] = {}
        for path, linear in linears.items():
            layer = FloatAdapterLinear(linear, *first_factors(linear, rank), scale=alpha / rank)
            model.set_submodule(path, layer)
            self.layers[path] = layer
        self.parameters = {
            f"{path}.{name}": parameter
            for path, layer in self.layers.items()
            for name, parameter in layer.named_parameters(recurse=False)
        }

    @torch.no_grad()
    def settled(self) -> Settled:
        if self.merge:
            return Settled({f"{path}.weight": merged(layer) for path, layer in self.layers.items()}, {})
        adapter: dict[str, Tensor] = {}
        for path, layer in self.layers.items():
            adapter |= {f"{path}.lora_A": layer.lora_A, f"{path}.lora_B": layer.scale * layer.lora_B}
        return Settled({}, adapter)


def first_factors(linear: nn.Linear | LoraLinear, rank: int) -> tuple[Tensor, Tensor]:
    """A (r, n) and B (m, r) as a LoRA begins, in float32 at least."""
    held = next(itertools.chain(linear.parameters(), linear.buffers()))
    dtype = torch.promote_types(held.dtype, torch.float32) if held.is_floating_point() else torch.float32
    A = torch.empty(rank, linear.in_features, dtype=dtype)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    return A.to(held.device), torch.zeros(linear.out_features, rank, dtype=dtype, device=held.device)


def merged(layer: FloatAdapterLinear) -> Tensor:
    """W + scale B A, in float32 at least."""
    weight: Any = layer.base.weight
    return weight.to(layer.lora_A.dtype) + layer.scale * (layer.lora_B @ layer.lora_A)
