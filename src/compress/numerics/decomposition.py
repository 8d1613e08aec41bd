"""A weight W as S + B A: S sparse, or on a grid, or both, and a low-rank adapter for what S lacks.

    the mask        by magnitude or Wanda's score; while SparseGPT's sweep compensates; or where 3BASiL's ADMM puts it
    the grid        of W, or of what the mask leaves of it
    S               W rounded within the mask, or swept (GPTQ, SparseGPT), and then improved by coordinate descent
    B A             fitted to W - S; then S to W - B A, and so on for some rounds

With magnitude or Wanda, rounding to nearest and one round this is SLiM's order (arXiv 2410.09615, algorithms 1 and 2);
its code goes on to subtract the adapter from W and to prune and round that anew, which it does not say: it helps a
little, a second round, which fits the adapter to that as well, more. ADMM, sweeps and rounds are ours to put together:
mask, weights and adapter settle for one another.

Dimensions: W (m, n), m outputs, n inputs, r the adapter's rank.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from compress.errors import NumericalError
from compress.numerics.adapters import AdapterMethod, fit_adapter
from compress.numerics.admm import sparse_plus_lowrank
from compress.numerics.grids import Grid, Numbers, Sharing
from compress.numerics.hessian import Hessian
from compress.numerics.lowrank import Factors, InputMoments
from compress.numerics.rescale import rescaled
from compress.numerics.sparsity import Pattern, keep_mask, magnitude, wanda
from compress.numerics.steps import StepMethod, finer_inputs, make_grid
from compress.numerics.sweep import descend, sweep

Pruner = Literal["magnitude", "wanda", "sparsegpt", "admm"]
DAMPING = 0.01  # of the mean of H's diagonal


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """iterations: of ADMM."""

    method: Pruner
    pattern: Pattern
    iterations: int = 200


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """
    steps: how they are chosen. sweeps: by GPTQ rather than to nearest. by_activation: its columns in that order.
    finer: SLiM-Quant^O. stored: the dtype of the steps.
    """

    numbers: Numbers
    group: Sharing
    steps: StepMethod
    sweeps: bool
    symmetric: bool = True
    by_activation: bool = False
    finer: bool = False
    stored: torch.dtype | None = None


@dataclass(frozen=True, kw_only=True)
class Adapting:
    """rounds: how often adapter and weights are fitted to one another."""

    method: AdapterMethod
    rank: int
    rounds: int = 1


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """What to make of a weight. polish: rounds of steps and codes, each at its best for the others, after a sweep."""

    prune: Pruning | None = None
    quantize: Rounding | None = None
    adapt: Adapting | None = None
    polish: int = 0

    @property
    def compensates(self) -> bool:
        """Whether weights change to make up for others."""
        return self.finds_mask or (self.quantize is not None and self.quantize.sweeps)

    @property
    def finds_mask(self) -> bool:
        return self.prune is not None and self.prune.method in ("sparsegpt", "admm")


@dataclass(frozen=True)
class Decomposed:
    """
    S: zero outside the mask, and on the grid. shift: what to add to the bias; None where there is none.
    """

    S: Float64[Tensor, "m n"]
    mask: Bool[Tensor, "m n"] | None
    grid: Grid | None
    adapter: Factors | None
    shift: Float64[Tensor, "m"] | None

    @property
    def product(self) -> Float64[Tensor, "m n"]:
        """The weight that it is."""
        return self.S if self.adapter is None else self.S + self.adapter.product


def decompose(
    W: Float64[Tensor, "m n"],
    moments: InputMoments,
    how: Decomposition,
    *,
    centred: bool = False,
    dtype: torch.dtype = torch.float64,
    name: str,
) -> Decomposed:
    """
    centred: a bias keeps the outputs' mean, so that errors count about it. dtype: that sweeps and ADMM compute in.
    """
    solver = Solver(how, moments, moments.spread(centred=centred).hessian(DAMPING, name=name), dtype, name)
    adapter, rest, mask = None, W, None
    if how.prune is not None and how.prune.method == "admm":
        mask, rest = solver.admm(W)
    elif how.prune is not None and how.prune.method != "sparsegpt":
        mask = solver.scored(W)
    rounds = how.adapt.rounds if how.adapt else 1
    for _ in range(rounds):
        S, found, grid = solver.settle(rest, mask)
        if how.adapt is not None:
            adapter = fit_adapter(how.adapt.method, W - S, moments, how.adapt.rank, centred=centred, name=name)
            rest = W - adapter.product
    shift = None
    if centred:
        shift = (rest - S) @ moments.mean
    return Decomposed(S, found, grid, adapter, shift)


@dataclass(frozen=True)
class Solver:
    how: Decomposition
    moments: InputMoments
    hessian: Hessian
    dtype: torch.dtype
    name: str

    def scored(self, W: Float64[Tensor, "m n"]) -> Bool[Tensor, "m n"]:
        assert self.how.prune is not None
        prune = self.how.prune
        if prune.method == "magnitude":
            return keep_mask(magnitude(W), prune.pattern, by_row=False)
        return keep_mask(wanda(W, self.moments.second), prune.pattern)

    def admm(self, W: Float64[Tensor, "m n"]) -> tuple[Bool[Tensor, "m n"], Float64[Tensor, "m n"]]:
        """The mask, and what is left of W beside the low rank that settled with it."""
        assert self.how.prune is not None
        prune, rank = self.how.prune, self.how.adapt.rank if self.how.adapt else 0
        split = sparse_plus_lowrank(W.to(self.dtype), self.hessian, prune.pattern, rank, iterations=prune.iterations)
        return split.mask, W - split.L.double()

    def settle(
        self, T: Float64[Tensor, "m n"], mask: Bool[Tensor, "m n"] | None
    ) -> tuple[Float64[Tensor, "m n"], Bool[Tensor, "m n"] | None, Grid | None]:
        """S near T, its mask and its grid."""
        quantize = self.how.quantize
        grid = None
        if quantize is not None and quantize.sweeps:
            grid = self.grid(T if mask is None else T * mask)
        S = T if mask is None else T * mask
        if self.how.compensates:
            S, mask, grid = self.swept(T, mask, grid)
        if quantize is not None and not quantize.sweeps:
            # As SLiM does: the steps of the weights before their mask, which zeros do not change.
            grid = self.grid(S if self.how.compensates else T)
            S = grid.nearest(S) if mask is None else grid.nearest(S) * mask
        return S, mask, grid

    def swept(
        self, T: Float64[Tensor, "m n"], mask: Bool[Tensor, "m n"] | None, grid: Grid | None
    ) -> tuple[Float64[Tensor, "m n"], Bool[Tensor, "m n"] | None, Grid | None]:
        how = self.how
        pattern = how.prune.pattern if how.prune is not None and mask is None else None
        target, coarse = T.to(self.dtype), None if grid is None else grid.to(self.dtype)
        by_activation = how.quantize is not None and how.quantize.by_activation
        S, mask = sweep(target, self.hessian, grid=coarse, pattern=pattern, mask=mask, by_activation=by_activation)
        for _ in range(how.polish):
            if coarse is not None and how.quantize is not None:
                S, coarse = rescaled(S, target, self.hessian, coarse, stored=how.quantize.stored)
            S = descend(S, target, self.hessian, grid=coarse, mask=mask, rounds=1)
        S = S.double()
        if coarse is not None:  # to the grid's own values again, whatever precision the sweep was in
            grid = coarse.to(torch.float64)
            S = grid.nearest(S) if mask is None else grid.nearest(S) * mask
        return S, mask, grid

    def grid(self, W: Float64[Tensor, "m n"]) -> Grid:
        assert self.how.quantize is not None
        how = self.how.quantize
        finer = finer_inputs(W, self.moments.mean_abs) if how.finer else None
        grid = make_grid(
            W,
            how.numbers,
            group=how.group,
            method=how.steps,
            symmetric=how.symmetric,
            stored=how.stored,
            finer=finer,
        )
        if not torch.isfinite(grid.step).all():
            raise NumericalError(
                f"A scale of {self.name} is NaN or does not fit in {how.stored}. "
                "Check its weights, or try --dtype bfloat16 or float32."
            )
        return grid
