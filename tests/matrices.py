"""Drawn matrices and what is measured of them; what the tests of the numerics share."""

from typing import Any

import torch
from torch import Tensor

from compress.numerics.grids import QuantizationArgs
from compress.numerics.moments import InputMoments
from compress.numerics.obs import compensated, elimination


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def args_of(num_bits: int, group: int | str = "channel", **how: Any) -> QuantizationArgs:
    """group: what shares a step, so many inputs or a strategy."""
    shared: Any = {"group_size": group} if isinstance(group, int) else {"strategy": group}
    return QuantizationArgs(num_bits=num_bits, **shared, **how)


def rows(n: int = 32, *, count: int = 200, seed: int = 0, dead: tuple[int, ...] = ()) -> Tensor:
    """Correlated inputs of unlike sizes, whose means are not zero."""
    X = random(count, n, seed=seed) @ random(n, n, seed=seed + 1) @ torch.diag(torch.logspace(0, -1, n).double())
    X = X + random(n, seed=seed + 2)
    X[:, list(dead)] = 0
    return X


def measured(X: Tensor) -> InputMoments:
    return InputMoments(X.T @ X / len(X), X.mean(0), X.abs().mean(0))


def identity(width: int) -> Tensor:
    return torch.eye(width, dtype=torch.float64)


def cut(M: Tensor, rank: int) -> Tensor:
    """The SVD's first `rank` parts, one by one."""
    U, S, Vh = torch.linalg.svd(M)
    return sum((S[i] * torch.outer(U[:, i], Vh[i]) for i in range(rank)), torch.zeros_like(M))


def prune_units(W: Tensor, G: Tensor, units: Tensor, keep: int, *, damping: float, name: str) -> tuple[Tensor, Tensor]:
    """`keep` units, increasing, and the compensated W, zero in all others."""
    kept = elimination(W, G, units, keep, damping=damping, name=name).kept(keep)
    return kept, compensated(W, G, units, kept, damping=damping, name=name)


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())
