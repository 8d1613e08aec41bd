"""Quantization grids: integers of 2 to 8 bits, 8-bit or 4-bit floats, times a step.

One step for the whole matrix, for each output channel, or for each group of neighboring inputs of a channel. Integers
are -2^(b-1) .. 2^(b-1) - 1, as engines store them; symmetric about 0 unless a grid has zero points. How steps are
chosen is in `numerics/steps.py`.

Microscaling formats say what a step can be: in MXFP4 a power of two for 32 inputs (OCP Microscaling Formats 1.0,
section 5), in NVFP4 for 16 an 8-bit float over a divisor of the whole matrix.

Dimensions: W (m, n), m outputs, n inputs in groups of `group`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from compress.numerics.block_types import BlockType

FLOAT8 = torch.float8_e4m3fn
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the 4-bit floats that have no sign, by their codes
FLOAT4_STEPS = {16: FLOAT8, 32: torch.float8_e8m0fnu}  # the dtype of 4-bit floats' steps by their group: NVFP4, MXFP4
SIDE = 128  # of a block
Strategy = Literal["tensor", "channel", "group", "tensor_group", "block"]


class QuantizationArgs(BaseModel):
    """How numbers are quantized, in the words of compressed-tensors' QuantizationArgs.

    num_bits, type: integers of 2 to 8 bits; floats of 8 (e4m3), or of 4 (e2m1) in groups of 16 (NVFP4) or 32 (MXFP4).
    symmetric: whether 0 has the code 0; if not, there are zero points.
    strategy: what shares a scale: the `tensor`, a `channel`, a `group` of inputs of a channel, such a group beside a
        scale of the tensor (`tensor_group`, NVFP4), or a `block` of 128 x 128.
    group_size: inputs of a group; implies the strategy.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    num_bits: Annotated[int, Field(ge=2, le=8)] = 4
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    strategy: Strategy = "channel"
    group_size: Annotated[int, Field(ge=2)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _implied(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("group_size") is not None and data.get("strategy") is None:
            is_nvfp4 = (data.get("type"), data.get("num_bits", 4), data["group_size"]) == ("float", 4, 16)
            return {**data, "strategy": "tensor_group" if is_nvfp4 else "group"}
        return data

    @model_validator(mode="after")
    def _known_format(self) -> "QuantizationArgs":
        size, strategy = self.group_size, self.strategy
        if self.type == "float" and self.num_bits != 8 and self.scale_dtype is None:
            raise ValueError("floats have 8 bits (fp8), or 4 in groups of 16 (nvfp4) or 32 (mxfp4); take one of these")
        if (strategy in ("group", "tensor_group")) != (size is not None):
            raise ValueError(f"strategy group and a group_size go together; got strategy {strategy}, group_size {size}")
        if (strategy == "tensor_group") != (self.scale_dtype == FLOAT8):
            raise ValueError(
                f"strategy tensor_group is that of nvfp4 and of nothing else; got {strategy} with {self.precision}"
            )
        if strategy == "block" and self.type != "float":
            raise ValueError("strategy block is of fp8 weights; take 8-bit floats (--bits fp8), or another strategy")
        if self.type == "float" and not self.symmetric:
            raise ValueError(f"{self.precision} is symmetric; leave asymmetric out")
        return self

    @property
    def precision(self) -> int | str:
        """As the command says it: bits of integers, `fp8`, `nvfp4` or `mxfp4`."""
        if self.type == "int":
            return self.num_bits
        return "fp8" if self.num_bits == 8 else "nvfp4" if self.group_size == 16 else "mxfp4"

    @property
    def scale_dtype(self) -> torch.dtype | None:
        """What the format has scales in; None where it is the model's dtype."""
        return FLOAT4_STEPS.get(self.group_size or 0) if self.type == "float" and self.num_bits == 4 else None

    @classmethod
    def of_name(cls, name: str) -> "QuantizationArgs":
        """Symmetric integers by a name such as int4-g128 or int8-channel. Raises ValueError for what is none."""
        match = re.fullmatch(r"int([2-8])-(?:channel|g([1-9]\d{0,5}))", name)
        if match is None:
            raise ValueError(f"{name!r} is no type of integers. Write int4-g128, or int8-channel.")
        return cls(num_bits=int(match[1]), group_size=None if match[2] is None else int(match[2]))

    @property
    def name(self) -> str:
        """As `of_name` reads it."""
        return f"int{self.num_bits}-{'channel' if self.group_size is None else f'g{self.group_size}'}"

    @property
    def lowest(self) -> float:
        return -self.highest if self.type == "float" else -(2.0 ** (self.num_bits - 1))

    @property
    def highest(self) -> float:
        """The largest number, before it is multiplied by its scale."""
        if self.type == "int":
            return 2.0 ** (self.num_bits - 1) - 1
        return E2M1[-1] if self.num_bits == 4 else torch.finfo(FLOAT8).max

    def nearest(self, x: Tensor) -> Tensor:
        return self.nearest_(x.clone())

    def nearest_(self, x: Tensor) -> Tensor:
        """Round to the nearest number, in place."""
        x.clamp_(self.lowest, self.highest)
        if self.type == "int":
            return x.round_()
        if self.num_bits == 8:
            return x.copy_(x.to(FLOAT8))
        size = x.abs()
        gap = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(x.dtype)  # between neighbors
        return x.div_(gap).round_().mul_(gap)

    @property
    def stored(self) -> torch.dtype:
        return FLOAT8 if self.type == "float" else torch.int8


@dataclass(frozen=True)
class Grid:
    """The values that a weight's numbers may take: codes times steps.

    kind: of the numbers that steps multiply. group_size: how many adjacent inputs share a step; the last group of a row
        may be smaller. The rows of a block have the same steps.
    step: (m or 1, groups). zero: the code of 0, of the same shape; None for 0 itself.
    finer: (n,) what an input's weights are multiplied by before they are rounded, and divided by after; None for 1.
    divisor: what steps are divided by after they have been rounded to the dtype that stores them.
    """

    kind: QuantizationArgs | BlockType
    group_size: int
    step: Float[Tensor, "_ groups"]
    zero: Float[Tensor, "_ groups"] | None = None
    finer: Float[Tensor, "n"] | None = None
    divisor: float = 1.0

    def to(self, dtype: torch.dtype) -> "Grid":
        zero, finer = (None if tensor is None else tensor.to(dtype) for tensor in (self.zero, self.finer))
        return replace(self, step=self.step.to(dtype), zero=zero, finer=finer)

    @classmethod
    def stacked(cls, grids: Sequence[Any]) -> "Grid":
        """The grid of matrices stacked by rows, each with steps for its rows and without `finer`."""
        zeros = [grid.zero for grid in grids if grid.zero is not None]
        step = torch.cat([grid.step for grid in grids])
        return replace(grids[0], step=step, zero=torch.cat(zeros) if zeros else None)

    def rows(self, start: int, stop: int) -> "Grid":
        zero = None if self.zero is None else self.zero[start:stop]
        return replace(self, step=self.step[start:stop], zero=zero)

    def codes(self, W: Float[Tensor, "m n"]) -> Tensor:
        """Integer codes (m, n), in the dtype they are stored in."""
        return self._codes(W).to(self.kind.stored)

    def values(self, codes: Tensor) -> Float[Tensor, "m n"]:
        offset, codes = self.offset(codes.shape[1]), codes.to(self.step.dtype)
        return (codes if offset is None else codes - offset) * self.scale(codes.shape[1])

    def nearest(self, W: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """The grid's own value nearest to each weight."""
        return self.values(self._codes(W))

    def dequantized(self, W: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """W's nearest values as decoders compute them."""
        return self.nearest(W)

    def _codes(self, W: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        offset, x = self.offset(W.shape[1]), W / self.scale(W.shape[1])
        return self.kind.nearest_(x if offset is None else x.add_(offset))

    def scale(self, n: int) -> Float[Tensor, "_ n"]:
        """The scale of each weight's code less its offset; stored column by column."""
        step = self._of_inputs(self.step, n)
        return step if self.finer is None else step / self.finer

    def offset(self, n: int) -> Float[Tensor, "_ n"] | None:
        """The zero point of each weight."""
        return None if self.zero is None else self._of_inputs(self.zero, n)

    def _of_inputs(self, shared: Float[Tensor, "_ groups"], n: int) -> Float[Tensor, "_ n"]:
        return shared.T.repeat_interleave(self.group_size, 0)[:n].T
