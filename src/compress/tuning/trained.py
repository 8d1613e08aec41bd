"""What is trained in a checkpoint: a LoRA, the factors of its linears, all its weights, or the adapters that it has.

A LoRA (arXiv 2106.09685) begins and is scaled as PEFT's: A drawn at random, B zero, their product multiplied by
alpha / rank. An adapter that is stored in codes is trained through its rounding (SLiM, arXiv 2410.09615): what the
model computes with is always the grid's own value, and the gradient passes as if nothing had been rounded. The steps of
its grid stay as they were compressed, so that training begins with the checkpoint to the bit.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.models.loading import load_model
from compress.models.storage import LoraLinear
from compress.models.stored_loading import is_stored, load_stored
from compress.tuning.linears import CompactAdapterLinear, FloatAdapterLinear, TrainedMatrix, dequantize
from compress.tuning.looking import Prepared
from compress.tuning.structure import adapted_linears, block_linears, compact_linears, thin_linears


@dataclass(frozen=True)
class Settled:
    """What training has come to, by the model's own names, in the dtype it was computed in.

    tensors: in place of those that the files have. adapter: a new one beside them, `PATH.lora_A` (r, n) and
        `PATH.lora_B` (m, r), to be multiplied by nothing else.
    """

    tensors: Mapping[str, Tensor]
    adapter: Mapping[str, Tensor]


@runtime_checkable
class Trained(Protocol):
    """
    model: to be asked for logits. parameters: what a step changes, by name.
    """

    model: Any
    parameters: dict[str, nn.Parameter]

    def settled(self) -> Settled: ...


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


class Weights:
    """
    parameters: by their names in the model, tied ones once.
    """

    def __init__(self, model: PreTrainedModel, parameters: dict[str, nn.Parameter]) -> None:
        model.requires_grad_(False)
        self.model: Any = model
        self.parameters = parameters
        for parameter in parameters.values():
            parameter.requires_grad_()

    def settled(self) -> Settled:
        return Settled({name: parameter.detach() for name, parameter in self.parameters.items()}, {})


def all_weights(model: PreTrainedModel) -> Weights:
    return Weights(model, {name: each for name, each in model.named_parameters() if each.is_floating_point()})


def factors(model: PreTrainedModel) -> Weights:
    """Of every thin linear both, with their biases."""
    found = {f"{path}.{name}": each for path, thin in thin_linears(model) for name, each in thin.named_parameters()}
    return Weights(model, found)


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


def open_trained(prepared: Prepared, device: torch.device) -> Trained:
    """The checkpoint in memory, with what is trained in it."""
    settings, dtype = prepared.job.settings, prepared.computing(device)
    model = open_folder(prepared.job.folder, dtype, device)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(settings.seed)
    trained = with_trained(model, prepared)
    if prepared.is_dequantized(device):
        dequantize(model, dtype)
    return trained


def with_trained(model: PreTrainedModel, prepared: Prepared) -> Trained:
    settings, what = prepared.job.settings, prepared.what
    if what == "factors":
        return factors(model)
    if what == "all":
        return all_weights(model)
    if what == "adapters":
        return CompactAdapters(model) if compact_linears(model) else PackedAdapters(model)
    linears = block_linears(model, prepared.config)
    if prepared.metadata.storage == "packed":
        linears = {path: linear for path, linear in linears.items() if isinstance(linear, LoraLinear)}
    return Lora(model, linears, rank=settings.lora_rank, alpha=settings.alpha, merge=prepared.merge)


def open_teacher(prepared: Prepared, device: torch.device) -> PreTrainedModel | None:
    if prepared.teacher is None:
        return None
    return open_folder(prepared.teacher, prepared.computing(device), device).requires_grad_(False)


def open_folder(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A checkpoint that is finished, or finished but for its compress.json: what was packed stays packed in memory."""
    load = load_stored if is_stored(folder) else load_model
    return load(folder, dtype=dtype, device=device)
