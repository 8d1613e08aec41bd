"""Which weights stay: patterns, scores, masks.

A pattern keeps so many of every group of neighbouring inputs (2:4, 4:8), or a share of all weights wherever they are.
Scores: `magnitude` |w|, and Wanda's |w| ||x|| (arXiv 2306.11695), x the inputs of the linear. A mask is True for what
stays. SparseGPT's mask is chosen while its sweep compensates (`numerics/sweep.py`).

Dimensions: W (m, n), m outputs, n inputs.
"""

import re
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """
    keep: of every `group` neighbouring inputs, or, with group 0, the share of all weights that stays.
    """

    keep: int | float
    group: int = 0

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """`2:4` keeps 2 of every 4; `50%` deletes half of all. Raises ValueError with the rule."""
        if found := re.fullmatch(r"(\d+):(\d+)", text):
            keep, group = int(found[1]), int(found[2])
            if 0 < keep < group <= 16:
                return cls(keep, group)
        elif found := re.fullmatch(r"(\d+(?:\.\d+)?)%", text):
            deleted = float(found[1]) / 100
            if 0 < deleted < 1:
                return cls(1 - deleted)
        raise ValueError(f"a pattern is keep:group such as 2:4, groups up to 16, or a share such as 50%; got {text!r}")

    @property
    def density(self) -> float:
        return self.keep / self.group if self.group else self.keep

    @cached_property
    def is_grouped(self) -> bool:
        return self.group > 0


def magnitude(W: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    return W.abs()


def wanda(W: Float[Tensor, "m n"], second: Float[Tensor, "n n"]) -> Float[Tensor, "m n"]:
    """second: E x x^T."""
    return W.abs() * second.diagonal().clamp_min(0).sqrt().to(W.dtype)


def grouped_mask(scores: Float[Tensor, "m n"], pattern: Pattern) -> Bool[Tensor, "m n"]:
    """The best of every group; the first of equals."""
    groups = scores.unflatten(1, (-1, pattern.group))
    order = groups.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    mask.scatter_(-1, order[..., : int(pattern.keep)], True)
    return mask.flatten(1)


def free_mask(scores: Float[Tensor, "m n"], density: float, *, by_row: bool) -> Bool[Tensor, "m n"]:
    """The best share of each row, as Wanda compares, or of the whole matrix, as magnitude pruning does."""
    compared = scores if by_row else scores.reshape(1, -1)
    deleted = int(round((1 - density) * compared.shape[1], 6))
    order = compared.argsort(dim=-1, stable=True)
    mask = torch.ones_like(compared, dtype=torch.bool)
    mask.scatter_(-1, order[:, :deleted], False)
    return mask.view(scores.shape)


def keep_mask(scores: Float[Tensor, "m n"], pattern: Pattern, *, by_row: bool = True) -> Bool[Tensor, "m n"]:
    return grouped_mask(scores, pattern) if pattern.is_grouped else free_mask(scores, pattern.density, by_row=by_row)
