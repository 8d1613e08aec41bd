"""The adapters that a checkpoint has already, trained beside weights that stay as they are (SLiM, arXiv 2410.09615).

An adapter that is stored in codes is trained through its rounding: what the model computes with is always the grid's
own value, and the gradient passes as if nothing had been rounded (straight-through; Bengio et al., arXiv 1308.3432).
The steps of its grid stay as they were compressed, so that what training begins with is the checkpoint to the bit.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.models.packing import pack_bits, unsigned
from compress.own_model.modeling_compress import StoredMatrix
from compress.tuning.lora import Settled
from compress.tuning.structure import adapted_linears, compact_linears

FACTORS = ("first", "second")


class StraightThrough(torch.autograd.Function):
    """The nearest integers, with the gradient of the numbers themselves."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class PackedAdapters:
    """lora_A and lora_B of every linear that has them."""

    def __init__(self, model: PreTrainedModel) -> None:
        model.requires_grad_(False)
        self.model: Any = model
        self.parameters: dict[str, nn.Parameter] = {}
        for path, linear in adapted_linears(model).items():
            for name in ("lora_A", "lora_B"):
                trained = nn.Parameter(getattr(linear, name).detach().float())
                setattr(linear, name, trained)
                self.parameters[f"{path}.{name}"] = trained

    def settled(self) -> Settled:
        return Settled({name: parameter.detach() for name, parameter in self.parameters.items()}, {})


class TrainedMatrix(nn.Module):
    """In the place of a `StoredMatrix`: the same numbers, and a parameter that they come of.

    weight: (rows, columns). scale: (rows, groups) of codes; None where the numbers themselves are stored.
    """

    def __init__(self, stored: StoredMatrix) -> None:
        super().__init__()
        self.stored = stored
        self.num_rows, self.num_parameters = stored.num_rows, stored.num_parameters
        self.weight = nn.Parameter(stored.rows(0, stored.num_rows, torch.float32))

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """As the stored matrix gives them."""
        weight = self.weight[start:stop]
        if self.stored.bits is None:
            return weight.to(dtype)
        scale = self.stored.scales(start, stop, torch.float32)
        codes: Tensor = StraightThrough.apply(self.bounded(weight / scale))
        return (codes * scale).to(dtype)

    def bounded(self, codes: Tensor) -> Tensor:
        end = 2 ** (self.stored.bits - 1)
        return codes.clamp(-end, end - 1)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored of it now, by name."""
        if self.stored.bits is None:
            return {"values": self.weight.detach()}
        codes = self.bounded(self.weight / self.stored.scales(0, self.num_rows, torch.float32)).round()
        return {"codes": pack_bits(unsigned(codes.to(torch.int8), self.stored.bits), self.stored.bits)}


class CompactAdapters:
    """Both factors of every linear that has them, whatever they are stored in."""

    def __init__(self, model: PreTrainedModel) -> None:
        model.requires_grad_(False)
        self.model: Any = model
        self.matrices: dict[str, TrainedMatrix] = {}
        for path, linear in compact_linears(model).items():
            if linear.first is None:
                continue
            for name in FACTORS:
                trained = TrainedMatrix(getattr(linear, name))
                setattr(linear, name, trained)
                self.matrices[f"{path}.{name}"] = trained
        self.parameters = {name: matrix.weight for name, matrix in self.matrices.items()}

    @torch.no_grad()
    def settled(self) -> Settled:
        found = {
            f"{path}.{name}": tensor
            for path, matrix in self.matrices.items()
            for name, tensor in matrix.tensors().items()
        }
        return Settled(found, {})
