"""The adapters that a checkpoint has already, trained beside weights that stay as they are (SLiM, arXiv 2410.09615).

An adapter that is stored in codes is trained through its rounding: what the model computes with is always the grid's
own value, and the gradient passes as if nothing had been rounded. The steps of its grid stay as they were compressed,
so that what training begins with is the checkpoint to the bit.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compress.tuning.linears import CompactAdapterLinear, FloatAdapterLinear, TrainedMatrix
from compress.tuning.lora import Settled
from compress.tuning.structure import adapted_linears, compact_linears


class PackedAdapters:
    """lora_A and lora_B of every linear that has them."""

    def __init__(self, model: PreTrainedModel) -> None:
        model.requires_grad_(False)
        self.model: Any = model
        self.parameters: dict[str, nn.Parameter] = {}
        for path, linear in adapted_linears(model).items():
            stored: Any = linear.lora_A, linear.lora_B
            A, B = (factor.detach().float() for factor in stored)
            linear.lora_A = linear.lora_B = None
            put = FloatAdapterLinear(linear, A, B)
            model.set_submodule(path, put)
            self.parameters |= {f"{path}.lora_A": put.lora_A, f"{path}.lora_B": put.lora_B}

    def settled(self) -> Settled:
        return Settled({name: parameter.detach() for name, parameter in self.parameters.items()}, {})


class CompactAdapters:
    """Both factors of every linear that has them, whatever they are stored in."""

    def __init__(self, model: PreTrainedModel) -> None:
        model.requires_grad_(False)
        self.model: Any = model
        self.matrices: dict[str, TrainedMatrix] = {}
        for path, linear in compact_linears(model).items():
            if linear.first is None:
                continue
            put = CompactAdapterLinear(linear, linear.first, linear.second)
            linear.first = linear.second = None
            model.set_submodule(path, put)
            self.matrices |= {f"{path}.first": put.first, f"{path}.second": put.second}
        self.parameters = {name: matrix.weight for name, matrix in self.matrices.items()}

    @torch.no_grad()
    def settled(self) -> Settled:
        found = {
            f"{path}.{name}": tensor
            for path, matrix in self.matrices.items()
            for name, tensor in matrix.tensors().items()
        }
        return Settled(found, {})
