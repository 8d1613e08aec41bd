"""A weight W as S + B A: S sparse, or on a grid, or both, and a low-rank adapter for what S lacks.

    the mask        by magnitude or Wanda's score; while SparseGPT's sweep compensates; or where 3BASiL's ADMM puts it
    the grid        of W, or of what the mask leaves of it
    S               W rounded within the mask, or swept (GPTQ, SparseGPT), and then improved by coordinate descent
    B A             fitted to W - S; then S to W - B A, and so on for some rounds

With magnitude or Wanda, rounding to nearest and one round this is SLiM's order (arXiv 2410.09615, algorithms 1 and 2);
its code goes on to subtract the adapter from W and to prune and round that anew, which it does not say: it helps a
little, a second round, which fits the adapter to that as well, more. ADMM, sweeps and rounds are ours to put together:
mask, weights and adapter are fitted to one another. Each round sweeps anew: going on from S as it is loses
more than it saves.

Dimensions: W (m, n), m outputs, n inputs, r the adapter's rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Float64, Shaped
from torch import Tensor

from compress.errors import NumericalError
from compress.numerics.admm import sparse_plus_lowrank
from compress.numerics.block_grid import BlockGrid, fit_blocks, polished
from compress.numerics.block_types import BlockType
from compress.numerics.grids import FLOAT8, Grid, QuantizationArgs
from compress.numerics.lowrank import AdapterMethod, Factors, fit_adapter
from compress.numerics.moments import Hessian, InputMoments
from compress.numerics.sparsity import Pattern, keep_mask, wanda
from compress.numerics.steps import StepMethod, finer_inputs, make_grid, shared_divisor
from compress.numerics.sweep import descend, rescaled, sweep

Weight = Float64[Tensor, "m n"]
Mask = Bool[Tensor, "m n"]

Pruner = Literal["magnitude", "wanda", "sparsegpt", "admm"]
DAMPING = 0.01  # of the mean of H's diagonal


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """How the mask is found. iterations: of ADMM."""

    method: Pruner
    pattern: Pattern
    iterations: int = 40


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How weights are put on a grid.

    steps: how they are chosen. sweeps: by GPTQ rather than to nearest. actorder: its columns in that order.
    important_inputs: SLiM-Quant^O. stored: the dtype of the steps. divisor: of all steps, see `Grid`; found with the
    weights.
    blocks: llama.cpp's type, in place of all these.
    """

    args: QuantizationArgs
    steps: StepMethod
    sweeps: bool
    actorder: bool = False
    important_inputs: bool = False
    stored: torch.dtype | None = None
    divisor: float = 1.0
    blocks: BlockType | None = None


@dataclass(frozen=True, kw_only=True)
class Adapting:
    """How the low-rank adapter is fitted. rounds: how often adapter and weights are fitted to one another."""

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
        """Whether weights change to compensate for errors of others."""
        finds_mask = self.prune is not None and self.prune.method in ("sparsegpt", "admm")
        return finds_mask or (self.quantize is not None and self.quantize.sweeps)

    @property
    def rows_are_independent(self) -> bool:
        """Whether S of a row is the same whatever other rows there are."""
        prune, quantize = self.prune, self.quantize
        shares_steps = quantize is not None and (quantize.args.strategy == "tensor" or quantize.important_inputs)
        return not shares_steps and (prune is None or prune.method != "sparsegpt" or prune.pattern.is_grouped)


@dataclass(frozen=True)
class Decomposed:
    """S: zero outside the mask, and on the grid. shift: what to add to the bias; None where there is none."""

    S: Weight
    mask: Mask | None
    grid: Grid | None
    adapter: Factors | None
    shift: Float64[Tensor, "m"] | None

    @property
    def product(self) -> Weight:
        """The weight that S and the adapter make."""
        return self.S if self.adapter is None else self.S + self.adapter.product


def decompose_together(
    weights: Sequence[Float64[Tensor, "_ n"]],
    moments: InputMoments,
    hows: Sequence[Decomposition],
    *,
    centered: bool = False,
    dtype: torch.dtype = torch.float64,
    names: Sequence[str],
) -> list[Decomposed]:
    """Decompose weights with the same inputs; `hows` differ in ranks and grids at most.

    centered: a bias keeps the outputs' mean, so that errors count about it.
    dtype: that all but the adapters computes in.

    Where rows are independent, the weights are swept as one matrix: a column takes hardly longer for more rows. Steps
    in 8-bit floats have one divisor for all: engines fuse weights with the same inputs, and keep one of their divisors.
    """
    hessian, rounding = moments.spread(centered=centered).hessian(DAMPING, name=names[0]), hows[0].quantize
    if rounding is not None and rounding.stored == FLOAT8:
        rounding = replace(rounding, divisor=shared_divisor(max(float(W.abs().max()) for W in weights)))
        hows = [replace(how, quantize=rounding) for how in hows]
    solvers = [
        Solver(W, how, moments, hessian, centered=centered, dtype=dtype, name=name)
        for W, how, name in zip(weights, hows, names, strict=True)
    ]
    how = hows[0]
    if (prune := how.prune) is not None and prune.method == "admm":
        # S is then fitted to what is left of the weights beside the low ranks found with the masks.
        ranks = [each.adapt.rank if each.adapt else 0 for each in hows]
        targets = [solver.target for solver in solvers]
        splits = sparse_plus_lowrank(targets, hessian, prune.pattern, ranks, iterations=prune.iterations)
        for solver, split in zip(solvers, splits, strict=True):
            solver.target, solver.mask = solver.target - split.L, split.mask
    batches = dict[Any, list[Solver]]()  # swept as one matrix: those on grids of one kind, where rows are independent
    for place, solver in enumerate(solvers):
        key = solver.how.quantize, None if solver.how.rows_are_independent else place
        batches.setdefault(key, []).append(solver)
    for _ in range(how.adapt.rounds if how.adapt else 1):
        for batch in batches.values():
            solve(batch)
        if how.adapt is not None:
            for solver in solvers:
                solver.fit_adapter(how.adapt.method)
    return [solver.decomposed() for solver in solvers]


@dataclass(frozen=True)
class Rounded:
    """S of one weight, or of several stacked by rows: zero outside the mask, and on the grid."""

    S: Float[Tensor, "m n"]
    mask: Mask | None
    grid: Grid | None

    @classmethod
    def stacked(cls, parts: Sequence["Rounded"]) -> "Rounded":
        if len(parts) == 1:
            return parts[0]
        masks = [part.mask for part in parts if part.mask is not None]
        grids = [part.grid for part in parts if part.grid is not None]
        S, mask = stack_rows([part.S for part in parts]), stack_rows(masks) if masks else None
        return cls(S, mask, type(grids[0]).stacked(grids) if grids else None)

    def split(self, rows: Sequence[int]) -> list["Rounded"]:
        if len(rows) == 1:
            return [self]
        parts = []
        for m, stop in zip(rows, accumulate(rows), strict=True):
            mask = None if self.mask is None else self.mask[stop - m : stop]
            grid = None if self.grid is None else self.grid.rows(stop - m, stop)
            parts.append(Rounded(self.S[stop - m : stop], mask, grid))
        return parts


class Solver:
    """Decompose one weight.

    target: what S is fitted to, W less the adapter. mask: the one S keeps to; None where there is none, or where the
    sweep finds it. current: S as it is. `target` and `current` are in the dtype that is computed in.
    """

    def __init__(
        self,
        W: Weight,
        how: Decomposition,
        moments: InputMoments,
        hessian: Hessian,
        *,
        centered: bool,
        dtype: torch.dtype,
        name: str,
    ) -> None:
        self.W, self.how, self.moments, self.hessian = W, how, moments, hessian
        self.centered, self.name = centered, name
        self.adapter: Factors | None = None
        self.target = stack_rows([W.to(dtype)])
        self.mask: Mask | None = None
        if how.prune is not None and how.prune.method == "magnitude":
            self.mask = keep_mask(W.abs(), how.prune.pattern, by_row=False)
        elif how.prune is not None and how.prune.method == "wanda":
            self.mask = keep_mask(wanda(W, moments.second), how.prune.pattern)
        self.current = Rounded(self.target, self.mask, None)

    def start(self) -> Rounded:
        """The start of a sweep: the target within the mask, where that is known, and the grid for it."""
        quantize = self.how.quantize
        S = self.target if self.mask is None else self.target * self.mask
        return Rounded(S, self.mask, self.grid(S) if quantize is not None and quantize.sweeps else None)

    def take(self, found: Rounded) -> None:
        """Keep what was found, rounded to nearest if no sweep has rounded it."""
        if self.how.quantize is not None and found.grid is None:
            # As SLiM does: the steps of the weights before their mask, which zeros do not change.
            grid = self.grid(found.S if self.how.compensates else self.target)
            found = replace(found, S=grid.nearest(found.S), grid=grid)
        self.current = found

    def fit_adapter(self, method: AdapterMethod) -> None:
        """Fit the adapter to the error of S; the new target is what the adapter leaves."""
        assert self.how.adapt is not None
        missing, rank = self.W - self.exact()[0], self.how.adapt.rank
        self.adapter = fit_adapter(method, missing, self.moments, rank, centered=self.centered, name=self.name)
        self.target = stack_rows([(self.W - self.adapter.product).to(self.target.dtype)])

    def exact(self) -> tuple[Weight, Grid | None]:
        """S and its grid in float64, on the grid's exact values, whatever precision the sweep used."""
        S, grid = self.current.S.double(), self.current.grid
        if grid is None:
            return S, None
        grid = grid.to(torch.float64)
        return grid.nearest(S), grid

    def decomposed(self) -> Decomposed:
        S, grid = self.exact()
        found = Decomposed(S, self.current.mask, grid, self.adapter, None)
        return replace(found, shift=(self.W - found.product) @ self.moments.mean) if self.centered else found

    def grid(self, W: Float[Tensor, "m n"]) -> Grid:
        assert self.how.quantize is not None
        how = self.how.quantize
        if how.blocks is not None:
            return fit_blocks(W, how.blocks, self.hessian.damped.diagonal())
        finer = finer_inputs(W, self.moments.mean_abs.to(W.dtype)) if how.important_inputs else None
        grid = make_grid(W, how.args, method=how.steps, stored=how.stored, finer=finer, divisor=how.divisor)
        if not torch.isfinite(grid.step).all():
            raise NumericalError(
                f"A scale of {self.name} is NaN or does not fit in {how.stored}. "
                "Check its weights, or try --dtype bfloat16 or float32."
            )
        return grid


def solve(solvers: Sequence[Solver]) -> None:
    """Fit S of each to its target, all as one matrix."""
    how, hessian, target = solvers[0].how, solvers[0].hessian, stack_rows([solver.target for solver in solvers])
    found = Rounded.stacked([solver.start() for solver in solvers])
    if how.compensates:
        mask, grid, quantize = found.mask, found.grid, how.quantize
        pattern = how.prune.pattern if how.prune is not None and mask is None else None
        actorder = quantize is not None and quantize.actorder
        S, mask = sweep(target, hessian, grid=grid, pattern=pattern, mask=mask, actorder=actorder)
        if isinstance(grid, BlockGrid):
            S, grid = polished(S, target, hessian, grid, mask=mask, rounds=how.polish)
        else:
            for _ in range(how.polish):
                if grid is not None and quantize is not None and quantize.args.strategy != "block":
                    S, grid = rescaled(S, target, hessian, grid, stored=quantize.stored)
                S = descend(S, target, hessian, grid=grid, mask=mask, rounds=1)
        found = Rounded(S, mask, grid)
    for solver, part in zip(solvers, found.split([len(solver.W) for solver in solvers]), strict=True):
        solver.take(part)


def stack_rows(matrices: Sequence[Shaped[Tensor, "_ n"]]) -> Shaped[Tensor, "m n"]:
    """Stack matrices by rows, stored column by column, as sweeps read them."""
    return torch.cat([matrix.T for matrix in matrices], dim=1).T
