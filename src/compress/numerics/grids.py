"""Grids that weights are rounded to: integers of 2 to 8 bits or 8-bit floats, times a step.

One step for the whole matrix, for each output channel, or for each group of neighbouring inputs of a channel. Integers
are -2^(b-1) .. 2^(b-1) - 1, as engines store them; symmetric about 0 unless a grid has zero points. How steps are
chosen is in `numerics/steps.py`.

Dimensions: W (m, n), m outputs, n inputs in groups of `group`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
# What shares a step along the inputs: everything, a row, or so many neighbours in it.
Sharing = int | Literal["tensor", "channel"]


@dataclass(frozen=True)
class Numbers:
    """The numbers of a grid before they are multiplied by its step.

    bits: of each. floating: 8-bit floats (e4m3) rather than integers.
    """

    bits: int
    floating: bool = False

    @property
    def lowest(self) -> float:
        return -self.highest if self.floating else -(2.0 ** (self.bits - 1))

    @property
    def highest(self) -> float:
        return torch.finfo(FLOAT8).max if self.floating else 2.0 ** (self.bits - 1) - 1

    def nearest(self, x: Tensor) -> Tensor:
        clipped = x.clamp(self.lowest, self.highest)
        return clipped.to(FLOAT8).to(x.dtype) if self.floating else clipped.round()

    @property
    def stored(self) -> torch.dtype:
        return FLOAT8 if self.floating else torch.int8


@dataclass(frozen=True)
class Grid:
    """
    group: how many neighbouring inputs share a step; the last group of a row may be smaller.
    step: (m or 1, groups). zero: the code of 0, of the same shape; None for 0 itself.
    finer: (n,) what an input's weights are multiplied by before they are rounded, and divided by after; None for 1.
    """

    numbers: Numbers
    group: int
    step: Float[Tensor, "_ groups"]
    zero: Float[Tensor, "_ groups"] | None = None
    finer: Float[Tensor, "n"] | None = None

    def to(self, dtype: torch.dtype) -> "Grid":
        zero, finer = (None if tensor is None else tensor.to(dtype) for tensor in (self.zero, self.finer))
        return Grid(self.numbers, self.group, self.step.to(dtype), zero, finer)

    def codes(self, W: Float[Tensor, "m n"]) -> Tensor:
        """(m, n), in the dtype they are stored in."""
        return self._codes(W, 0).to(self.numbers.stored)

    def values(self, codes: Tensor) -> Float[Tensor, "m n"]:
        return self._values(codes.to(self.step.dtype), 0)

    def nearest(self, W: Float[Tensor, "m inputs"], start: int = 0) -> Float[Tensor, "m inputs"]:
        """The grid's own value nearest to each weight; of the inputs from `start` on."""
        return self._values(self._codes(W, start), start)

    def _codes(self, W: Tensor, start: int) -> Tensor:
        groups = self._groups(start, start + W.shape[1])
        step = self.step[:, groups]
        scaled = W if self.finer is None else W * self.finer[start : start + W.shape[1]]
        x = scaled / step
        return self.numbers.nearest(x if self.zero is None else x + self.zero[:, groups])

    def _values(self, codes: Tensor, start: int) -> Tensor:
        groups = self._groups(start, start + codes.shape[1])
        if self.zero is not None:
            codes = codes - self.zero[:, groups]
        values = codes * self.step[:, groups]
        return values if self.finer is None else values / self.finer[start : start + codes.shape[1]]

    def _groups(self, start: int, stop: int) -> Tensor | slice:
        """Of the inputs from `start` to `stop`, to index the steps' columns by."""
        first, last = start // self.group, (stop - 1) // self.group
        if first == last:  # a view, where a sweep asks for a column at a time
            return slice(first, first + 1)
        return torch.arange(start, stop, device=self.step.device) // self.group
