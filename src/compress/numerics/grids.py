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
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from compress.numerics.block_types import BlockType

FLOAT8 = torch.float8_e4m3fn
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the 4-bit floats that have no sign, by their codes
FLOAT4_STEPS = {16: FLOAT8, 32: torch.float8_e8m0fnu}  # the dtype of 4-bit floats' steps by their group: NVFP4, MXFP4
# What shares a step along the inputs: everything, a row, so many neighbors in it, or so many in as many rows.
Granularity = int | Literal["tensor", "channel", "128x128"]
BLOCK: Literal["128x128"] = "128x128"
SIDE = 128  # of a block


@dataclass(frozen=True)
class QuantType:
    """The number type of a grid, before scaling by its step.

    bits: of each. floating: floats rather than integers, e4m3 in 8 bits, e2m1 in 4.
    """

    bits: int
    floating: bool = False

    @property
    def lowest(self) -> float:
        return -self.highest if self.floating else -(2.0 ** (self.bits - 1))

    @property
    def highest(self) -> float:
        if not self.floating:
            return 2.0 ** (self.bits - 1) - 1
        return E2M1[-1] if self.bits == 4 else torch.finfo(FLOAT8).max

    def nearest(self, x: Tensor) -> Tensor:
        return self.nearest_(x.clone())

    def nearest_(self, x: Tensor) -> Tensor:
        """Round to the nearest value of the grid, in place."""
        x.clamp_(self.lowest, self.highest)
        if not self.floating:
            return x.round_()
        if self.bits == 8:
            return x.copy_(x.to(FLOAT8))
        size = x.abs()
        gap = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(x.dtype)  # between neighbors
        return x.div_(gap).round_().mul_(gap)

    @property
    def stored(self) -> torch.dtype:
        return FLOAT8 if self.floating else torch.int8


@dataclass(frozen=True)
class IntegerType:
    """Symmetric integers of `bits` and what shares a step, by a name such as int4-g128 or int8-channel."""

    bits: int
    group: int | Literal["channel"]

    @classmethod
    def parse(cls, name: str) -> "IntegerType":
        """Raises ValueError for what is no such name."""
        match = re.fullmatch(r"int([2-8])-(?:channel|g([1-9]\d{0,5}))", name)
        if match is None:
            raise ValueError(f"{name!r} is no type of integers. Write int4-g128, or int8-channel.")
        return cls(int(match[1]), "channel" if match[2] is None else int(match[2]))

    def __str__(self) -> str:
        return f"int{self.bits}-{self.group if isinstance(self.group, str) else f'g{self.group}'}"


@dataclass(frozen=True)
class Grid:
    """
    group: how many adjacent inputs share a step; the last group of a row may be smaller. The rows of a block have the
        same steps.
    step: (m or 1, groups). zero: the code of 0, of the same shape; None for 0 itself.
    finer: (n,) what an input's weights are multiplied by before they are rounded, and divided by after; None for 1.
    divisor: what steps are divided by after they have been rounded to the dtype that stores them.
    """

    quant_type: QuantType | BlockType
    group: int
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
        return self._codes(W).to(self.quant_type.stored)

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
        return self.quant_type.nearest_(x if offset is None else x.add_(offset))

    def scale(self, n: int) -> Float[Tensor, "_ n"]:
        """The scale of each weight's code less its offset; stored column by column."""
        step = self._of_inputs(self.step, n)
        return step if self.finer is None else step / self.finer

    def offset(self, n: int) -> Float[Tensor, "_ n"] | None:
        """The zero point of each weight."""
        return None if self.zero is None else self._of_inputs(self.zero, n)

    def _of_inputs(self, shared: Float[Tensor, "_ groups"], n: int) -> Float[Tensor, "_ n"]:
        return shared.T.repeat_interleave(self.group, 0)[:n].T
