"""Linears and embedding tables in llama.cpp's quantized types, as a GGUF file stores them."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from compress.numerics.block_types import TYPES
from compress.own_model.modeling_compress import AdaptedLinear


class BlockLinear(AdaptedLinear):
    """
    qweight: uint8 (m, bytes a row). values: what these are, float32 (m, n); not stored, and None of an empty linear.
    """

    def __init__(self, in_features: int, out_features: int, type_name: str, *, bias: bool) -> None:
        super().__init__(in_features, out_features, bias)
        kind = TYPES[type_name]
        size = in_features // kind.block * kind.bytes
        self.qweight: Tensor = nn.Buffer(torch.zeros(out_features, size, dtype=torch.uint8))
        self.values: Tensor | None
        self.register_buffer("values", None, persistent=False)

    @property
    def num_parameters(self) -> int:
        return self.in_features * self.out_features + (0 if self.bias is None else self.out_features)

    def put(self, qweight: UInt8[Tensor, "m bytes"], values: Float[Tensor, "m n"]) -> None:
        self.qweight, self.values = qweight, values

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        assert self.values is not None
        return self.values[start:stop].to(dtype)

    def adapter(self, _dtype: torch.dtype) -> None:
        return None

    def without_adapter(self, x: Tensor) -> Tensor:
        assert self.values is not None
        return nn.functional.linear(x, self.values.to(x.dtype), self.bias)
