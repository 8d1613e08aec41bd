"""Choose the type of every matrix under a number of bytes: predict by the survey, correct by trials.

Each matrix has a ladder of types, each with its bytes and what it costs the loss (`calibration/roundings.py`); the
bytes are spent on all ladders together. What the prediction gets wrong, it gets wrong for matrices of a kind and of a
depth alike. So a trial takes one such group for more costly, or less, and spends the same bytes again, which moves some
matrices of the group up and others down; it is kept where the measured divergence falls (the swaps of EvoPress, arXiv
2410.14649, a group at a time). What is found holds for other sizes too.
"""

import math
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.architectures import packed_types
from compress.architectures.architecture import header_bytes, tensor_bytes
from compress.architectures.gguf_types import row_bytes
from compress.calibration.linears import LinearShape
from compress.calibration.sites import Table
from compress.calibration.weights import renumbered
from compress.errors import UsageError
from compress.models.gguf_header import ALIGNMENT
from compress.models.storage import Storage
from compress.numerics.allocation import Ladder, spend
from compress.numerics.grids import QuantizationArgs
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

    rungs: of each matrix, by its path in the dense model, the types it may get and their bytes, the last as it is.
    beside: bytes of all else.
    tables: those of the matrices that are no linears of a block. units: matrices that have one type, by path; others
        are alone.
    """

    rungs: Mapping[str, Mapping[str, int]]
    beside: int
    tables: frozenset[str] = frozenset()
    units: Sequence[tuple[str, ...]] = ()

    @classmethod
    def of(cls, plan: Plan, folder: Path, name: str) -> "TypeSpace":
        """Find the matrices and their types. folder: of the dense model. name: as a GGUF file will call it."""
        found = cls._of_gguf(plan, folder, name) if plan.spec.is_gguf else cls._of_packed(plan)
        dense_path = partial(renumbered, numbers=dict(enumerate(plan.kept)))
        rungs = {dense_path(path): sizes for path, sizes in found.rungs.items()}
        return replace(found, rungs=rungs, units=[tuple(map(dense_path, unit)) for unit in found.units])

    @classmethod
    def _of_packed(cls, plan: Plan) -> "TypeSpace":
        """Bytes of the safetensors files, headers as `disk_bytes` has them."""
        stage, spec = open_stage(plan), replace(plan.spec, undecided=frozenset())
        engine, dtype, rungs = stage.quantize.engine, spec.dtype, dict[str, dict[str, int]]()

        def bytes_of(linear: LinearShape, name: str) -> int:
            tensors: Mapping[str, int] = {"weight": linear.m * linear.n * dtype.itemsize}
            if name != DENSE:
                storage = Storage("packed", QuantizationArgs.of_name(name))
                tensors = tensor_bytes(storage, linear.m, linear.n, dtype)
            return sum(size + header_bytes(f"{linear.path}.{tensor}") for tensor, size in tensors.items())

        for linear in spec.written_linears:
            types = stage.candidates(linear.n) if stage.targets(linear) else ()
            if types:
                rungs[linear.path] = {each: bytes_of(linear, each) for each in (*types, DENSE)}
        units = [*packed_types.fused(spec)] if engine == "vllm" else []
        # A linear that stays as it is keeps those that vLLM puts together with it from few bits.
        stuck = {path for paths in units for path in paths if not {*paths} <= rungs.keys()}
        rungs = {path: sizes for path, sizes in rungs.items() if path not in stuck}
        units = [paths for paths in units if paths[0] in rungs]
        dense = sum(sizes[DENSE] for sizes in rungs.values())
        return cls(rungs, spec.disk_bytes - dense, units=units)

    @classmethod
    def _of_gguf(cls, plan: Plan, folder: Path, name: str) -> "TypeSpace":
        from compress.checkpoints.gguf import bytes_beside

        spec, config, stage = plan.spec, plan.spec.config(), open_stage(plan)
        shapes = {linear.path: (linear.m, linear.n) for linear in spec.written_linears if stage.targets(linear)}
        has_tables = any(each.site is Table for each in plan.stages)
        tables = {path: (config.vocab_size, width) for path, width in spec.tables} if has_tables else {}
        rungs = {}
        for path, (rows, inputs) in (shapes | tables).items():
            if types := stage.candidates(inputs):
                sizes = {each: rows * row_bytes(each, inputs) for each in types}
                sizes[DENSE] = rows * inputs * min(4, spec.dtype.itemsize)  # GGUF has no float64 weights
                rungs[path] = {each: -(-size // ALIGNMENT) * ALIGNMENT for each, size in sizes.items()}
        beside = bytes_beside(config, folder, rungs, name=name, dtype=spec.dtype)
        return cls(rungs, beside, frozenset(tables))

    @property
    def least(self) -> int:
        return self.beside + sum(min(sizes for sizes, _ in self.ladder(unit)) for unit in self.all_units)

    @property
    def most(self) -> int:
        return self.bytes_of({})

    @cached_property
    def all_units(self) -> list[tuple[str, ...]]:
        """The units, and the matrices that are alone."""
        together = {path for paths in self.units for path in paths}
        return [*self.units, *((path,) for path in self.rungs if path not in together)]

    def ladder(self, unit: tuple[str, ...]) -> list[tuple[int, str]]:
        """The bytes of a unit in each of its types, from the smallest."""
        return sorted((sum(self.rungs[path][name] for path in unit), name) for name in self.rungs[unit[0]])

    def check(self, limit: int, shallowest: int | None = None) -> None:
        """Raises UsageError for a size that no types come to. shallowest: the least, one block left."""
        if not self.rungs:
            raise UsageError("None of the model's linears has inputs in whole groups. Quantize it another way.")
        least, what = (self.least, "types") if shallowest is None else (shallowest, "types, with one block left,")
        if not least <= limit < self.most:
            raise UsageError(
                f"{limit:,} bytes cannot be made of this model, or need not: {what} take it to {least:,} at least, "
                f"and it has {self.most:,} as it is. Name a size between them."
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

    def cost_of(self, path: str, name: str) -> float:
        factor = math.prod(self.factors.get(group, 1.0) for group in self.groups_of(path))
        return factor * self.costs[path][name]

    def allocated(self, limit: int) -> Types:
        """The types of least predicted cost within `limit` bytes."""
        rungs = {unit: self.space.ladder(unit) for unit in self.space.all_units}
        ladders = {
            unit[0]: Ladder(
                [size for size, _ in each], [sum(self.cost_of(path, name) for path in unit) for _, name in each]
            )
            for unit, each in rungs.items()
        }
        places = spend(ladders, limit - self.space.beside)
        assert places is not None  # checked beforehand
        named = {path: each[places[unit[0]]][1] for unit, each in rungs.items() for path in unit}
        return {path: named[path] for path in self.space.rungs if named[path] != DENSE}

    def predicted(self, types: Types) -> float:
        return self.scale * sum(self.cost_of(path, types.get(path, DENSE)) for path in self.costs)

    def with_factor(self, group: str, factor: float) -> "TypeSearch":
        return replace(self, factors={**self.factors, group: self.factors.get(group, 1.0) * factor})

    def groups(self, types: Types) -> list[str]:
        """All groups, those first that cost most."""
        totals = dict[str, float]()
        for path in self.costs:
            for group in self.groups_of(path):
                totals[group] = totals.get(group, 0.0) + self.cost_of(path, types.get(path, DENSE))
        return sorted(totals, key=lambda group: -totals[group])


def open_stage(plan: Plan) -> Any:
    """The stage whose types are to be found."""
    return next(stage for stage in plan.stages if stage.opens == "types")


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
