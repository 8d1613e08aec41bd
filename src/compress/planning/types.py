"""Choose the type of every matrix of a GGUF file under its bytes: predict by the survey, correct by trials.

Each matrix has a ladder of types, each with its bytes and what it costs the loss (`calibration/roundings.py`); the
bytes are spent on all ladders together. What the prediction gets wrong, it gets wrong for matrices of a kind and of a
depth alike. So a trial takes one such group for more costly, or less, and spends the same bytes again, which moves some
matrices of the group up and others down; it is kept where the measured divergence falls (the swaps of EvoPress, arXiv
2410.14649, a group at a time). What is found holds for other sizes too.
"""

import math
import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.architectures.gguf_types import candidates, row_bytes
from compress.calibration.sites import Table
from compress.errors import UsageError
from compress.models.gguf_header import ALIGNMENT
from compress.numerics.allocation import Ladder, spend
from compress.planning.plan import Plan

DENSE = "dense"  # the last rung: as it is
BLOCK = re.compile(r"\.(\d+)\.")
THIRDS = ("first blocks", "middle blocks", "last blocks")
STEP, LEAST_STEP = 2.0, 1.1  # factors of a trial; the square root is tried when no group is better for the last one
TINY = 1e-12
Types = dict[str, str]


@dataclass(frozen=True)
class TypeSpace:
    """The types that matrices may get, and their bytes.

    rungs: of each matrix, by path, the types it may get and their bytes, from the smallest. beside: bytes of all else.
    tables: those of the matrices that are no linears of a block.
    """

    rungs: Mapping[str, Mapping[str, int]]
    beside: int
    tables: frozenset[str]

    @classmethod
    def of(cls, plan: Plan, folder: Path, name: str) -> "TypeSpace":
        """Find the matrices and their types. folder: of the dense model. name: as the file will call it."""
        from compress.checkpoints.gguf import bytes_beside

        spec, config = plan.spec, plan.spec.config()
        stage: Any = next(stage for stage in plan.stages if stage.opens == "types")
        shapes = {linear.path: (linear.m, linear.n) for linear in spec.written_linears if stage.targets(linear)}
        has_tables = any(each.site is Table for each in plan.stages)
        tables = {path: (config.vocab_size, width) for path, width in spec.tables} if has_tables else {}
        rungs = {}
        for path, (rows, inputs) in (shapes | tables).items():
            if types := candidates(inputs):
                sizes = {each: rows * row_bytes(each, inputs) for each in types}
                sizes[DENSE] = rows * inputs * min(4, spec.dtype.itemsize)  # GGUF has no float64 weights
                rungs[path] = {each: -(-size // ALIGNMENT) * ALIGNMENT for each, size in sizes.items()}
        beside = bytes_beside(config, folder, rungs, name=name, dtype=spec.dtype)
        return cls(rungs, beside, frozenset(tables))

    @property
    def least(self) -> int:
        return self.beside + sum(min(rungs.values()) for rungs in self.rungs.values())

    @property
    def most(self) -> int:
        return self.beside + sum(max(rungs.values()) for rungs in self.rungs.values())

    def check(self, limit: int) -> None:
        """Raises UsageError for a size that no types come to."""
        if not self.least <= limit < self.most:
            raise UsageError(
                f"A GGUF file of {limit:,} bytes cannot be made of this model, or need not: types take it to "
                f"{self.least:,} at least, and it has {self.most:,} as it is. Name a size between them."
            )

    def bytes_of(self, types: Types) -> int:
        return self.beside + sum(rungs[types.get(path, DENSE)] for path, rungs in self.rungs.items())


@dataclass(frozen=True)
class TypeSearch:
    """What each type costs, predicted and corrected by trials.

    costs: of each matrix what its types cost the loss, in nats a token, by type. factors: what trials have found costs
        of a group to be multiplied by. scale: measured divergences by predicted ones.
    """

    space: TypeSpace
    costs: Mapping[str, Mapping[str, float]]
    factors: Mapping[str, float] = field(default_factory=dict)
    scale: float = 1.0

    @classmethod
    def of(cls, space: TypeSpace, roundings: Mapping[str, Tensor]) -> "TypeSearch":
        costs = {
            path: {**dict(zip(rungs, roundings[f"cost {path}"].tolist(), strict=False)), DENSE: 0.0}
            for path, rungs in space.rungs.items()
        }
        return cls(space, costs)

    @cached_property
    def num_blocks(self) -> int:
        return 1 + max((int(match[1]) for path in self.costs if (match := BLOCK.search(path))), default=0)

    def groups_of(self, path: str) -> list[str]:
        """The kind of a matrix, and how deep it is."""
        match, kind = BLOCK.search(path), path.rpartition(".")[2]
        return [kind] if match is None else [kind, THIRDS[3 * int(match[1]) // self.num_blocks]]

    def costs_of(self, path: str) -> list[float]:
        factor = math.prod(self.factors.get(group, 1.0) for group in self.groups_of(path))
        return [factor * cost for cost in self.costs[path].values()]

    def allocated(self, limit: int) -> Types:
        """The types of least predicted cost within `limit` bytes."""
        ladders = {path: Ladder([*rungs.values()], self.costs_of(path)) for path, rungs in self.space.rungs.items()}
        places = spend(ladders, limit - self.space.beside)
        assert places is not None  # checked beforehand
        named = {path: [*rungs][places[path]] for path, rungs in self.space.rungs.items()}
        return {path: name for path, name in named.items() if name != DENSE}

    def predicted(self, types: Types) -> float:
        found = (self.costs_of(path)[[*rungs].index(types.get(path, DENSE))] for path, rungs in self.costs.items())
        return self.scale * sum(found)

    def with_factor(self, group: str, factor: float) -> "TypeSearch":
        return replace(self, factors={**self.factors, group: self.factors.get(group, 1.0) * factor})

    def groups(self, types: Types) -> list[str]:
        """All groups, those first that cost most."""
        totals = dict[str, float]()
        for path, rungs in self.costs.items():
            for group in self.groups_of(path):
                cost = self.costs_of(path)[[*rungs].index(types.get(path, DENSE))]
                totals[group] = totals.get(group, 0.0) + cost
        return sorted(totals, key=lambda group: -totals[group])


Measure = Callable[[TypeSearch, Types, bool], float | None]


def improved(search: TypeSearch, limit: int, measure: Measure) -> tuple[TypeSearch, Types]:
    """Find factors of groups, and types, of less measured divergence.

    measure: the divergence of types, told whether the last ones were the best so far; None when no trials are left.
    """
    best, types, least, is_best = search, search.allocated(limit), math.inf, False
    tried, ways = list[tuple[Types, float]](), proposals(search, limit)
    proposal: TypeSearch | None = next(ways)
    while proposal is not None:
        allocated, is_better = proposal.allocated(limit), False
        if all(allocated != each for each, _ in tried):
            if (found := measure(proposal, allocated, is_best)) is None:
                break
            tried.append((allocated, found))
            is_best = is_better = found < least
            if is_better:
                best, types, least = proposal, allocated, found
        try:
            proposal = ways.send(is_better)
        except StopIteration:
            proposal = None
    logs = [math.log(max(found, TINY) / max(best.predicted(each), TINY)) for each, found in tried]
    return replace(best, scale=math.exp(sum(logs) / max(len(logs), 1))), types


def proposals(best: TypeSearch, limit: int) -> Generator[TypeSearch, bool, None]:
    """Say what is to be tried: the prediction, then each group with another factor, until the steps are small.

    It is sent whether the last one was better.
    """
    yield best
    step = STEP
    while step > LEAST_STEP:
        improves = False
        for group in best.groups(best.allocated(limit)):
            for factor in (step, 1 / step):
                if (yield best.with_factor(group, factor)):
                    best, improves = best.with_factor(group, factor), True
                    break
        step = step if improves else math.sqrt(step)
