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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float64, Shaped
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
    def takes_rows_apart(self) -> bool:
        """Whether each row of a weight is settled as if it were alone."""
        prune, quantize = self.prune, self.quantize
        shares_steps = quantize is not None and (quantize.group == "tensor" or quantize.finer)
        return not shares_steps and (prune is None or prune.method != "sparsegpt" or prune.pattern.is_grouped)

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
    centred: a bias keeps the outputs' mean, so that errors count about it. dtype: that all but the adapter computes in.
    """
    (found,) = decompose_together([W], moments, [how], centred=centred, dtype=dtype, names=[name])
    return found


def decompose_together(
    weights: Sequence[Float64[Tensor, "_ n"]],
    moments: InputMoments,
    hows: Sequence[Decomposition],
    *,
    centred: bool = False,
    dtype: torch.dtype = torch.float64,
    names: Sequence[str],
) -> list[Decomposed]:
    """Several weights with the same inputs, which differ in the adapter's rank at most: each as `decompose` has it.

    Where no row depends on another they are swept as one matrix: a step takes hardly longer for more rows.
    """
    hessian = moments.spread(centred=centred).hessian(DAMPING, name=names[0])
    solvers = [
        Solver(W, how, moments, hessian, centred=centred, dtype=dtype, name=name)
        for W, how, name in zip(weights, hows, names, strict=True)
    ]
    how = hows[0]
    if how.prune is not None and how.prune.method == "admm":
        split(solvers, how.prune)
    lots = [solvers] if how.takes_rows_apart else [[solver] for solver in solvers]
    for number in range(how.adapt.rounds if how.adapt else 1):
        for lot in lots:
            settle(lot, anew=number == 0 or not how.polish)
        for solver in solvers:
            solver.adapt()
    return [solver.found() for solver in solvers]


@dataclass(frozen=True)
class Settled:
    """Of one weight, or of several one below the other: S, zero outside of its mask and on its grid."""

    S: Float[Tensor, "m n"]
    mask: Bool[Tensor, "m n"] | None
    grid: Grid | None

    @classmethod
    def joined(cls, parts: Sequence["Settled"]) -> "Settled":
        if len(parts) == 1:
            return parts[0]
        masks = [part.mask for part in parts if part.mask is not None]
        grids = [part.grid for part in parts if part.grid is not None]
        S, mask = below([part.S for part in parts]), below(masks) if masks else None
        return cls(S, mask, Grid.joined(grids) if grids else None)

    def split(self, rows: Sequence[int]) -> list["Settled"]:
        if len(rows) == 1:
            return [self]
        S, stops = self.S.split(list(rows)), list(accumulate(rows))
        mask = [None] * len(rows) if self.mask is None else self.mask.split(list(rows))
        grid = [None if self.grid is None else self.grid.rows(stop - m, stop) for m, stop in zip(rows, stops, strict=True)]
        return [Settled(*part) for part in zip(S, mask, grid, strict=True)]


class Solver:
    """One weight on its way.

    rest: what S is to be, and `settled`, what it is, in the dtype that is computed in.
    """

    def __init__(
        self,
        W: Float64[Tensor, "m n"],
        how: Decomposition,
        moments: InputMoments,
        hessian: Hessian,
        *,
        centred: bool,
        dtype: torch.dtype,
        name: str,
    ) -> None:
        self.W, self.how, self.moments, self.hessian = W, how, moments, hessian
        self.centred, self.name = centred, name
        self.adapter: Factors | None = None
        self.rest = below([W.to(dtype)])
        scored = how.prune is not None and how.prune.method in ("magnitude", "wanda")
        self.settled = Settled(self.rest, self.scored(how.prune) if scored and how.prune else None, None)

    def scored(self, prune: Pruning) -> Bool[Tensor, "m n"]:
        if prune.method == "magnitude":
            return keep_mask(magnitude(self.W), prune.pattern, by_row=False)
        return keep_mask(wanda(self.W, self.moments.second), prune.pattern)

    def start(self) -> Settled:
        """What a sweep starts with: what the mask leaves, where it is known already, and the grid for that."""
        mask, quantize = self.settled.mask, self.how.quantize
        S = self.rest if mask is None else self.rest * mask
        return Settled(S, mask, self.grid(S) if quantize is not None and quantize.sweeps else None)

    def take(self, settled: Settled) -> None:
        """The end of a sweep, or what has not been swept; rounded to nearest, if it is not yet rounded."""
        if self.how.quantize is not None and settled.grid is None:
            # As SLiM does: the steps of the weights before their mask, which zeros do not change.
            grid = self.grid(settled.S if self.how.compensates else self.rest)
            settled = replace(settled, S=grid.nearest(settled.S), grid=grid)
        self.settled = settled

    def adapt(self) -> None:
        """The adapter for what S lacks; S is to be what it leaves."""
        adapt, missed = self.how.adapt, self.W - self.found().S
        if adapt is not None:
            options = {"centred": self.centred, "name": self.name}
            self.adapter = fit_adapter(adapt.method, missed, self.moments, adapt.rank, **options)
            self.rest = below([(self.W - self.adapter.product).to(self.rest.dtype)])

    def found(self) -> Decomposed:
        S, grid = self.settled.S.double(), self.settled.grid
        if grid is not None:  # its own values again, whatever precision the sweep was in
            grid = grid.to(torch.float64)
            S = grid.nearest(S)
        found = Decomposed(S, self.settled.mask, grid, self.adapter, None)
        return replace(found, shift=(self.W - found.product) @ self.moments.mean) if self.centred else found

    def grid(self, W: Float[Tensor, "m n"]) -> Grid:
        assert self.how.quantize is not None
        how = self.how.quantize
        finer = finer_inputs(W, self.moments.mean_abs.to(W.dtype)) if how.finer else None
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


def split(solvers: Sequence[Solver], prune: Pruning) -> None:
    """The masks by ADMM; what is left of the weights beside the low ranks that have settled with these is S to be."""
    weights = [solver.rest for solver in solvers]
    ranks = [solver.how.adapt.rank if solver.how.adapt else 0 for solver in solvers]
    parts = sparse_plus_lowrank(weights, solvers[0].hessian, prune.pattern, ranks, iterations=prune.iterations)
    for solver, part in zip(solvers, parts, strict=True):
        solver.rest = solver.rest - part.L
        solver.settled = Settled(solver.rest, part.mask, None)


def settle(solvers: Sequence[Solver], *, anew: bool) -> None:
    """S of each near its rest, from the start or on from where it is."""
    how, rest = solvers[0].how, below([solver.rest for solver in solvers])
    settled = Settled.joined([solver.start() if anew else solver.settled for solver in solvers])
    if how.compensates:
        settled = swept(rest, settled, how, solvers[0].hessian, anew=anew)
    for solver, part in zip(solvers, settled.split([len(solver.W) for solver in solvers]), strict=True):
        solver.take(part)


def swept(rest: Float[Tensor, "m n"], start: Settled, how: Decomposition, hessian: Hessian, *, anew: bool) -> Settled:
    S, mask, grid = start.S, start.mask, start.grid
    if anew:
        pattern = how.prune.pattern if how.prune is not None and mask is None else None
        by_activation = how.quantize is not None and how.quantize.by_activation
        S, mask = sweep(rest, hessian, grid=grid, pattern=pattern, mask=mask, by_activation=by_activation)
    for _ in range(how.polish):
        if grid is not None and how.quantize is not None:
            S, grid = rescaled(S, rest, hessian, grid, stored=how.quantize.stored)
        S = descend(S, rest, hessian, grid=grid, mask=mask, rounds=1)
    return Settled(S, mask, grid)


def below(matrices: Sequence[Shaped[Tensor, "_ n"]]) -> Shaped[Tensor, "m n"]:
    """One below the other; an input's numbers are neighbors in memory, as sweeps read them."""
    return torch.cat([matrix.T for matrix in matrices], dim=1).T
