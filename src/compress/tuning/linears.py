"""A linear whose weight is frozen and whose adapter is trained: y = W x + b + scale B (A x).

A frozen W never changes, so one that is stored in codes is made dense once, before training, where there is memory for
it (`dequantize`); unpacking it in every forward and backward pass costs as much as multiplying by it.

Dimensions: W (m, n), A (r, n), B (m, r).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from compress.models.int4 import Int4Linear
from compress.models.packing import pack_bits, unsigned
from compress.models.storage import LoraLinear, QuantizedLinear, RoundedInputs
from compress.own_model.modeling_compress import AdaptedLinear, CompactLinear, StoredMatrix

STORED_IN_CODES = (QuantizedLinear, Int4Linear, CompactLinear)


class DequantizedLinear(nn.Linear):
    """A stored linear with its weight dense and frozen, and without its adapter."""

    def __init__(self, stored: AdaptedLinear, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = stored.in_features, stored.out_features
        self.weight = nn.Parameter(dequantized(stored, dtype), requires_grad=False)
        self.bias = stored.bias
        self.inputs = stored.inputs if isinstance(stored, LoraLinear) else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x if self.inputs is None else RoundedInputs.apply(x, self.inputs))
        return y


@torch.no_grad()
def dequantized(linear: AdaptedLinear, dtype: torch.dtype) -> Tensor:
    """W (m, n)."""
    if isinstance(linear, Int4Linear):
        return linear.columns(0, linear.in_features).to(dtype)
    device = next(linear.buffers()).device
    parts = [linear.rows(start, stop, dtype) for start, stop in linear.blocks(device)]
    return torch.cat(parts)


def stored_in_codes(model: nn.Module) -> dict[str, AdaptedLinear]:
    """By their paths."""
    return {path: module for path, module in model.named_modules() if isinstance(module, STORED_IN_CODES)}


def dequantize(model: nn.Module, dtype: torch.dtype) -> None:
    """Put dense frozen linears in the places of those that are stored in codes, one after the other."""
    for path in list(stored_in_codes(model)):
        stored: Any = model.get_submodule(path)
        model.set_submodule(path, DequantizedLinear(stored, dtype))


class AdapterLinear(nn.Module):
    """
    base: computes W x + b.
    """

    def __init__(self, base: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.base = base
        self.scale = scale

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (r, n) and B^T (r, m)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        first, second = self.factors(x.dtype)
        y = torch.addmm(self.base(flat), flat @ first.T, second, alpha=self.scale)
        return y.view(*x.shape[:-1], y.shape[-1])


class FloatAdapterLinear(AdapterLinear):
    def __init__(self, base: nn.Module, A: Tensor, B: Tensor, scale: float = 1.0) -> None:
        super().__init__(base, scale)
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(B)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.lora_A.to(dtype), self.lora_B.T.to(dtype)


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
        self.bits = stored.bits
        self.weight = nn.Parameter(stored.rows(0, stored.num_rows, torch.float32))
        scale = None if stored.bits is None else stored.scales(0, stored.num_rows, torch.float32)
        self.register_buffer("scale", scale)

    def forward(self) -> Tensor:
        if self.scale is None:
            return self.weight
        rounded: Tensor = OnGrid.apply(self.weight, self.scale, self.bits)
        return rounded

    def tensors(self) -> dict[str, Tensor]:
        """What is stored of it now, by name."""
        if self.scale is None:
            return {"values": self.weight.detach()}
        codes = (self().detach() / self.scale).round().to(torch.int8)
        return {"codes": pack_bits(unsigned(codes, self.bits), self.bits)}


class CompactAdapterLinear(AdapterLinear):
    """first: A (r, n). second: B^T (r, m)."""

    def __init__(self, base: nn.Module, first: StoredMatrix, second: StoredMatrix) -> None:
        super().__init__(base)
        self.first = TrainedMatrix(first)
        self.second = TrainedMatrix(second)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.first().to(dtype), self.second().to(dtype)
