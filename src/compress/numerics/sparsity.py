"""Sparsity patterns, scores and masks.

A pattern keeps so many of every group of neighboring inputs (2:4, 4:8), or a share of all weights wherever they are.
Scores: `magnitude` |w|, and Wanda's |w| ||x|| (arXiv 2306.11695), x the inputs of the linear. A mask is True for what
stays. SparseGPT's mask is chosen while its sweep compensates (`numerics/sweep.py`).

Dimensions: W (m, n), m outputs, n inputs.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """Which weights stay. keep: of every `group` adjacent inputs, or, with group 0, the share of all weights."""

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


def wanda(W: Float[Tensor, "m n"], second: Float[Tensor, "n n"]) -> Float[Tensor, "m n"]:
    """Compute Wanda's scores (arXiv 2306.11695). second: E x x^T."""
    return W.abs() * second.diagonal().clamp_min(0).sqrt().to(W.dtype)


def ranks_in_group(scores: Float[Tensor, "m n"], group: int) -> Float[Tensor, "m n"]:
    """Count how many of its group come before each score: the larger ones, and of equal ones those on its left.

    Every two are compared, which is several times as fast as sorting. Counts have the dtype of the scores: comparing
    into booleans and adding those takes longer.
    """
    ranks = torch.empty_like(scores)
    members, counts = (x.unflatten(1, (-1, group)).unbind(-1) for x in (scores, ranks))
    for position, count in enumerate(counts):
        count.fill_(position)
    larger = torch.empty_like(members[0])
    for left, right in combinations(range(group), 2):
        torch.gt(members[right], members[left], out=larger)
        counts[left].add_(larger)
        counts[right].sub_(larger)
    return ranks


def free_mask(scores: Float[Tensor, "m n"], density: float, *, by_row: bool) -> Bool[Tensor, "m n"]:
    """Mask of the best share of each row, as Wanda compares, or of the whole matrix, as magnitude pruning does."""
    compared = scores if by_row else scores.reshape(1, -1)
    deleted = int(round((1 - density) * compared.shape[1], 6))
    if not deleted:
        return torch.ones_like(scores, dtype=torch.bool)
    last = compared.kthvalue(deleted, dim=-1, keepdim=True).values
    kept, equal = compared > last, compared == last
    # Of the scores equal to the last deleted one, the first ones are deleted.
    excess = compared.shape[1] - deleted - kept.sum(-1, keepdim=True)
    kept |= equal & (equal.flip(-1).cumsum(-1).flip(-1) <= excess)
    return kept.view(scores.shape)


def keep_mask(scores: Float[Tensor, "m n"], pattern: Pattern, *, by_row: bool = True) -> Bool[Tensor, "m n"]:
    """Mask of the best scores of every group, the first of equal ones, or of the best share (`free_mask`)."""
    if pattern.is_grouped:
        return ranks_in_group(scores, pattern.group) < int(pattern.keep)
    return free_mask(scores, pattern.density, by_row=by_row)
