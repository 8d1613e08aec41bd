"""What is trained in a checkpoint: a LoRA, the factors of its linears, all its weights, or the adapters that it has.

A LoRA (arXiv 2106.09685) begins and is scaled as PEFT's: A drawn at random, B zero, their product multiplied by
alpha / rank. An adapter that is stored in codes is trained through its rounding (SLiM, arXiv 2410.09615): what the
model computes with is always the grid's own value, and the gradient passes as if nothing had been rounded. The steps of
its grid stay as they were compressed, so that training begins with the checkpoint to the bit.

A frozen W never changes, so one that is stored in codes is made dense once, before training, where there is memory for
it (`dequantize`); unpacking it in every forward and backward pass costs as much as multiplying by it.

Dimensions: W (m, n), A (r, n), B (m, r).
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from compress.models.int4 import Int4Linear
from compress.models.loading import load_model
from compress.models.packing import pack_bits, unsigned
from compress.models.storage import LoraLinear, RoundedInputs
from compress.models.stored_loading import is_stored, load_stored
from compress.own_model.modeling_compress import AdaptedLinear, CompactLinear, StoredMatrix
from compress.tuning.looking import Prepared, block_linears, found, stored_in_codes, thin_linears


@dataclass(frozen=True)
class Settled:
    """What training has come to, by the model's own names, in the dtype it was computed in.

    tensors: in place of those that the files have. adapter: a new one beside them, `PATH.lora_A` (r, n) and
        `PATH.lora_B` (m, r), to be multiplied by nothing else.
    """

    tensors: Mapping[str, Tensor]
    adapter: Mapping[str, Tensor]


@dataclass(frozen=True)
class Trained:
    """A model and what of it is trained.

    model: to be asked for logits. parameters: what a step changes, by name. settled: gives what they have come to.
    """

    model: Any
    parameters: dict[str, nn.Parameter]
    settled: Callable[[], Settled]


def open_trained(prepared: Prepared, device: torch.device) -> Trained:
    """The checkpoint in memory, with what is trained in it."""
    settings, what, dtype = prepared.job.settings, prepared.what, prepared.computing(device)
    model = open_folder(prepared.job.folder, dtype, device)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(settings.seed)
    if what == "lora":
        linears: dict[str, Any] = block_linears(model, prepared.config)
        if prepared.metadata.form == "packed":
            linears = {path: linear for path, linear in linears.items() if isinstance(linear, LoraLinear)}
        trained = lora(model, linears, rank=settings.lora_rank, alpha=settings.alpha, merge=prepared.merge)
    elif what == "adapters":
        trained = compact_adapters(model) if found(model, CompactLinear) else packed_adapters(model)
    elif what == "all":
        trained = weights(model, {name: each for name, each in model.named_parameters() if each.is_floating_point()})
    else:  # both factors of every thin linear, with their biases
        thin = thin_linears(model).items()
        both = {f"{path}.{name}": each for path, one in thin for name, each in one.named_parameters()}
        trained = weights(model, both)
    if prepared.is_dequantized(device):
        dequantize(model, dtype)
    return trained


def open_teacher(prepared: Prepared, device: torch.device) -> PreTrainedModel | None:
    if prepared.teacher is None:
        return None
    return open_folder(prepared.teacher, prepared.computing(device), device).requires_grad_(False)


def open_folder(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A checkpoint that is finished, or finished but for its compress.json: what was packed stays packed in memory."""
    load = load_stored if is_stored(folder) else load_model
    return load(folder, dtype=dtype, device=device)


# Whole weights.


def weights(model: PreTrainedModel, parameters: dict[str, nn.Parameter]) -> Trained:
    """Train weights as they are. parameters: by their names in the model, tied ones once."""
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_()
    return Trained(model, parameters, lambda: Settled({name: each.detach() for name, each in parameters.items()}, {}))


# Adapters.


class AdapterLinear(nn.Module):
    """y = W x + b + scale B (A x), of which A and B are trained. base: computes W x + b."""

    def __init__(self, base: nn.Module, A: Tensor, B: Tensor, scale: float = 1.0) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (r, n) and B^T (r, m)."""
        return self.lora_A.to(dtype), self.lora_B.T.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        first, second = self.factors(x.dtype)
        y = torch.addmm(self.base(flat), flat @ first.T, second, alpha=self.scale)
        return y.view(*x.shape[:-1], y.shape[-1])


def lora(
    model: PreTrainedModel, linears: Mapping[str, nn.Linear | LoraLinear], *, rank: int, alpha: int, merge: bool
) -> Trained:
    """Train a LoRA on linears. linears: by their paths in the model; to be merged they must be plain ones."""
    model.requires_grad_(False)
    layers = {}
    for path, linear in linears.items():
        held = next(itertools.chain(linear.parameters(), linear.buffers()))
        dtype = torch.promote_types(held.dtype, torch.float32) if held.is_floating_point() else torch.float32
        A = torch.empty(rank, linear.in_features, dtype=dtype)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        B = torch.zeros(linear.out_features, rank, dtype=dtype, device=held.device)
        layers[path] = AdapterLinear(linear, A.to(held.device), B, scale=alpha / rank)
        model.set_submodule(path, layers[path])

    @torch.no_grad()
    def settled() -> Settled:
        weights, adapter = dict[str, Tensor](), dict[str, Tensor]()
        for path, layer in layers.items():
            A, B, base = layer.lora_A, layer.scale * layer.lora_B, layer.base
            if merge and isinstance(base, nn.Linear):
                weights[f"{path}.weight"] = base.weight.to(A.dtype) + layer.scale * (layer.lora_B @ A)
            else:
                adapter |= {f"{path}.lora_A": A, f"{path}.lora_B": B}
        return Settled(weights, adapter)

    return Trained(model, factors_of(layers), settled)


def factors_of(layers: Mapping[str, AdapterLinear]) -> dict[str, nn.Parameter]:
    return {
        f"{path}.{name}": parameter
        for path, layer in layers.items()
        for name, parameter in layer.named_parameters(recurse=False)
    }


def packed_adapters(model: PreTrainedModel) -> Trained:
    """lora_A and lora_B of every linear that has them."""
    model.requires_grad_(False)
    layers = {}
    for path, linear in found(model, LoraLinear).items():
        if linear.lora_A is not None:
            A, B = (factor.detach().float() for factor in (linear.lora_A, linear.lora_B))
            linear.lora_A = linear.lora_B = None
            layers[path] = AdapterLinear(linear, A, B)
            model.set_submodule(path, layers[path])
    return weights(model, factors_of(layers))


# Adapters in codes.


class OnGrid(torch.autograd.Function):
    """Numbers rounded to the nearest of a grid, with the gradient of the numbers themselves (straight-through).

    Where a number lies beyond the grid's ends its gradient is 0 (Bengio et al., arXiv 1308.3432).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, bits: int) -> Tensor:
        codes, end = x / scale, 2 ** (bits - 1)
        ctx.save_for_backward((codes >= -end) & (codes <= end - 1))
        return codes.clamp_(-end, end - 1).round_().mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (within,) = ctx.saved_tensors
        return gradient * within, None, None


class TrainedMatrix(nn.Module):
    """In the place of a `StoredMatrix`: the same numbers, and a parameter that they come of.

    weight: (rows, columns), float32. Called, it gives what is computed with: the weight, rounded to its grid where it
    is stored in codes. The grid's scales stay as they are.
    """

    scale: Tensor | None

    def __init__(self, stored: StoredMatrix) -> None:
        super().__init__()
        self.num_bits = stored.num_bits
        self.weight = nn.Parameter(stored.rows(0, stored.num_rows, torch.float32))
        scale = None if stored.num_bits is None else stored.scales(0, stored.num_rows, torch.float32)
        self.register_buffer("scale", scale)

    def forward(self) -> Tensor:
        if self.scale is None:
            return self.weight
        rounded: Tensor = OnGrid.apply(self.weight, self.scale, self.num_bits)
        return rounded

    def tensors(self) -> dict[str, Tensor]:
        """What is stored of it now, by name."""
        if self.scale is None:
            return {"values": self.weight.detach()}
        codes = (self().detach() / self.scale).round().to(torch.int8)
        return {"codes": pack_bits(unsigned(codes, self.num_bits), self.num_bits)}


class CompactAdapterLinear(AdapterLinear):
    """A compact linear whose adapter is trained. first: A (r, n). second: B^T (r, m)."""

    def __init__(self, base: nn.Module, first: StoredMatrix, second: StoredMatrix) -> None:
        nn.Module.__init__(self)
        self.base, self.scale = base, 1.0
        self.first, self.second = TrainedMatrix(first), TrainedMatrix(second)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.first().to(dtype), self.second().to(dtype)


def compact_adapters(model: PreTrainedModel) -> Trained:
    """Both factors of every linear that has them, whatever they are stored in."""
    model.requires_grad_(False)
    matrices: dict[str, TrainedMatrix] = {}
    for path, linear in found(model, CompactLinear).items():
        if linear.first is not None:
            put = CompactAdapterLinear(linear, linear.first, linear.second)
            linear.first = linear.second = None
            model.set_submodule(path, put)
            matrices |= {f"{path}.first": put.first, f"{path}.second": put.second}

    @torch.no_grad()
    def settled() -> Settled:
        stored = {path: matrix.tensors().items() for path, matrix in matrices.items()}
        return Settled({f"{path}.{name}": each for path, parts in stored.items() for name, each in parts}, {})

    return Trained(model, {name: matrix.weight for name, matrix in matrices.items()}, settled)


# Frozen weights, dense.


class DequantizedLinear(nn.Linear):
    """A stored linear with its weight dense and frozen, and without its adapter."""

    @torch.no_grad()
    def __init__(self, stored: AdaptedLinear, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = stored.in_features, stored.out_features
        if isinstance(stored, Int4Linear):
            weight = stored.columns(0, stored.in_features).to(dtype)
        else:
            ranges = stored.blocks(next(stored.buffers()).device)
            weight = torch.cat([stored.rows(start, stop, dtype) for start, stop in ranges])
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = stored.bias
        self.inputs, self.input_group = None, None
        if isinstance(stored, LoraLinear):
            self.inputs, self.input_group = stored.inputs, stored.input_group

    def forward(self, x: Tensor) -> Tensor:
        rounded = x if self.inputs is None else RoundedInputs.apply(x, self.inputs, self.input_group)
        y: Tensor = super().forward(rounded)
        return y


def dequantize(model: nn.Module, dtype: torch.dtype) -> None:
    """Put dense frozen linears in the places of those that are stored in codes, one after the other."""
    for path in list(stored_in_codes(model)):
        stored: Any = model.get_submodule(path)
        model.set_submodule(path, DequantizedLinear(stored, dtype))
