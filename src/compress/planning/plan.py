"""Plan what a recipe does to a model from its config.json alone: architecture, widths, sizes, memory, disk."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from compress.architectures.architecture import ModelSpec, Size, tensor_bytes
from compress.architectures.own import DECI_LM, Own
from compress.architectures.stock import Stock
from compress.calibration.depth import Depth
from compress.calibration.linears import LinearShape, LinearSite
from compress.calibration.sites import Table, WholeModel
from compress.calibration.survey import SurveyNeed
from compress.checkpoints.metadata import Alternative
from compress.errors import UsageError, report
from compress.families import Family, check_exact
from compress.models.gguf_header import DECI
from compress.models.storage import Storage
from compress.numerics.grids import QuantizationArgs
from compress.planning.budget import Choice, Limit, RankSpace, WidthSpace, plan_stages, width_choices
from compress.planning.memory import Footprint, Room, surveyed
from compress.recipe import Recipe
from compress.stages._stage import StageConfig
from compress.stages.factorize import Factorize


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a recipe does to a model, known before its weights are read.

    stages: as they will be run; with a budget, still open. spec: what the model becomes, as far as it is decided.
    space: the dense model, and what the stages can make of it. dense: its size. ranks: what ranks are to be found for,
        where a stage leaves them open.
    choices: what fits under the recipe's budget, to be compared by trial; empty without one.
    alternatives: other ways to store the linears, the plan itself first; none where all is as before.
    notes: what the user should know of it.
    room: what is held of the calibration text. memory_bytes: the most that is held at once beside the interpreter, as
        `memory.py` has it.
    disk_bytes: the output, the state a killed run resumes from, twice while it is replaced, and activations that
        memory does not hold.
    """

    stages: tuple[StageConfig, ...]
    spec: ModelSpec
    space: WidthSpace
    dense: Size
    ranks: RankSpace | None
    choices: list[Choice]
    alternatives: Sequence[Alternative]
    notes: list[str]
    room: Room
    memory_bytes: int
    disk_bytes: int

    @property
    def size(self) -> Size | None:
        """Size of the result; None where the data or a choice decides it."""
        return self.spec.size if self.spec.is_decided else None

    @property
    def removed(self) -> float | None:
        return None if self.size is None else 1 - self.size.parameters / self.dense.parameters

    @property
    def survey(self) -> SurveyNeed:
        return surveyed(self.stages)

    @property
    def opens_types(self) -> bool:
        """Whether types of matrices are to be found."""
        return "types" in self.spec.undecided

    @property
    def packs(self) -> bool:
        """Whether linears are stored as compressed-tensors has them, in types that may still be to be found."""
        return bool(self.spec.packed) or self.opens_types

    @property
    def kept(self) -> list[int]:
        """The numbers of the dense model's blocks that stay, as far as is known."""
        dropped = {block for stage in self.stages for block in stage.dropped}
        return [block for block in range(self.space.base.num_blocks) if block not in dropped]

    def chosen(self, choice: Choice) -> "Plan":
        space = self.space.decided(choice.counts)
        others = alternatives(choice.spec) if "types" in choice.counts else self.alternatives
        # What was said of our architecture is untrue of a choice that stays the stock class.
        untrue = set(self.spec.notes) - set(space.base.notes)
        notes, stages = [note for note in self.notes if note not in untrue], tuple(space.stages)
        decided = replace(self, stages=stages, spec=choice.spec, space=space, ranks=None, choices=[])
        return replace(decided, notes=notes, alternatives=others)

    def without(self, dropped: Sequence[int]) -> "Plan":
        """The plan once it is known which blocks, if any, are left out, in the order in which they go."""
        if self.choices:
            blocks = self.space.base.num_blocks
            found = [
                {**choice.counts, "dropped": tuple(dropped[: blocks - choice.spec.num_blocks])}
                for choice in self.choices
            ]
            return replace(self, choices=[Choice(counts, self.space.spec(counts)) for counts in found])
        decided = [
            stage.decided({"dropped": dropped}) if stage.site is Depth else stage
            for stage in self.stages
            if dropped or stage.site is not Depth
        ]
        stages, spec = plan_stages(decided, self.space.base)
        ranks = None if self.ranks is None else replace(self.ranks, spec=spec)
        return replace(self, stages=stages, spec=spec, space=replace(self.space, stages=stages), ranks=ranks)

    def to_dict(self) -> dict[str, Any]:
        spec = self.spec
        return {
            "architecture": spec.architecture.class_name,
            "loads_without_our_code": spec.architecture.is_stock,
            "widths": None if self.choices else list(spec.widths),
            "units": None if self.choices else dict(spec.units),
            "ranks": None if self.ranks else {path: factors.rank for path, factors in spec.factors.items()},
            "alternatives": [alternative.to_dict() for alternative in self.alternatives],
            "choices": [{**choice.label, **vars(choice.size)} for choice in self.choices],
            "dense": vars(self.dense),
            "size": None if self.size is None else vars(self.size),
            "removed": self.removed,
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
            "notes": self.notes,
        }


def make_plan(
    recipe: Recipe, config: Any, family: Family, *, dtype: torch.dtype, computing: torch.dtype, room: Room
) -> Plan:
    """Plan a recipe. Raises UsageError with what of it does not fit the model."""
    report(mixture_faults(recipe.stages, has_budget=recipe.budget is not None))
    base = choose_base(recipe, config, family, dtype)
    stages, spec = plan_stages(recipe.stages, base)
    space, dense = width_space(recipe, stages, base), ModelSpec.dense(Stock(config, family), dtype).size
    opened = next((stage for stage in stages if isinstance(stage, Factorize) and stage.open_ranks), None)
    ranks = None if opened is None else RankSpace(opened, spec)
    choices = list[Choice]()
    if recipe.budget is not None and ranks is not None:
        ranks.check(Limit.of(recipe.budget, dense))
    elif recipe.budget is not None and "types" not in spec.undecided:
        choices = width_choices(space, recipe.budget, dense)
    if spec.is_decided:
        report(spec.problems())
        on_linears = any(stage.site is LinearSite for stage in stages)
        shallower = spec.num_blocks < base.num_blocks
        if not (on_linears or shallower) and spec.deletes_nothing:
            raise UsageError("The recipe deletes nothing: every width stays as it is. Add a slice stage.")
    notes, tokens = [*spec.notes], recipe.calibration.samples * recipe.calibration.seq_len
    widest = max(family.dense_units(config).get("neurons", 0), config.hidden_size)
    if tokens < 4 * widest and any(stage.site is LinearSite for stage in recipe.stages):
        what = f"Calibration has {tokens:,} tokens for linears of {widest:,} inputs: expect a poor fit."
        notes.append(f"{what} Use more --samples.")
    sizes = [spec.size] if spec.is_decided else [choice.size for choice in choices] or [dense]
    notes += tables_in_full(spec)
    memory, disk = Footprint(stages, config, family, computing).needs(recipe.calibration, room)
    plan = Plan(
        stages=stages,
        spec=spec,
        space=space,
        dense=dense,
        ranks=ranks,
        choices=choices,
        alternatives=alternatives(spec) if spec.storage and "types" not in spec.undecided else (),
        notes=notes,
        room=room,
        memory_bytes=memory,
        disk_bytes=max(size.bytes for size in sizes) + disk,
    )
    decided = len(choices) == 1 and recipe.budget is not None and recipe.budget.allocation == "uniform"
    return plan.chosen(choices[0]) if decided else plan


def width_space(recipe: Recipe, stages: Sequence[StageConfig], base: ModelSpec) -> WidthSpace:
    """What the stages can make of a model.

    Where the budget may be spent without changing the stream, that is written as the dense model is.
    """
    free = recipe.budget is not None and recipe.budget.allocation == "free"
    if free or not any(stage.opens and not stage.changes_stream for stage in stages):
        return WidthSpace(stages, base)
    plain = Stock(base.architecture.dense, base.architecture.family)
    return WidthSpace(stages, base, ModelSpec.dense(plain, base.dtype))


def choose_base(recipe: Recipe, config: Any, family: Family, dtype: torch.dtype) -> ModelSpec:
    """Choose the architecture that the result is written in; return the dense model in it.

    Raises UnsupportedModel where the recipe changes the stream of a model that has to keep it.
    """
    if not any(stage.changes_stream for stage in recipe.stages):
        return ModelSpec.dense(Stock(config, family), dtype)
    check_exact(config, family)
    if not any(stage.site is WholeModel for stage in recipe.stages):
        return ModelSpec.dense(Own(config, family), dtype)
    reason, is_free = why_own(config, family), recipe.budget is not None and recipe.budget.allocation == "free"
    stock = Stock(config, family, narrows=True)
    if reason is None and not is_free:
        return ModelSpec.dense(stock, dtype)
    own = Own(config, family, shortcuts=False)
    if is_free:
        reason = "MLPs of different widths have no stock shape, so the result is written in our architecture."
        windowed = getattr(config, "sliding_window", None) is not None
        if why_own(config, family) is None and stock.model_type in DECI and not windowed:
            own = Own(config, family, stock, free_widths=True, class_name=DECI_LM)
            reason = f"{reason} vLLM runs it as {DECI_LM}, llama.cpp too: --export gguf."
    return replace(ModelSpec.dense(own, dtype), notes=(str(reason),))


def why_own(config: Any, family: Family) -> str | None:
    """Say why a model in one basis cannot be written as a class of transformers."""
    if family.stock is None:
        return (
            f"{config.model_type} ties the heads' size to the hidden one, so the result is written in our architecture."
        )
    reason = family.stock.not_stock(config)
    return f"The result is written in our architecture: {reason}" if reason else None


def mixture_faults(stages: Sequence[StageConfig], *, has_budget: bool) -> list[str]:
    """Say what cannot be in one recipe with a stage that stores linears in fewer bits."""
    storing = [stage for stage in stages if stage.in_written_form]
    tables = [stage.stage for stage in stages if stage.site is Table]
    if tables and not any(stage.model_dump().get("form") in ("gguf", "packed") for stage in storing):
        return [f"{tables[0]} is for GGUF files and packed form. Give slim form: gguf or packed, or leave it out."]
    if not storing:
        return []
    name, problems = storing[0].stage, list[str]()
    if len(storing) > 1:
        problems.append(f"{name} is there twice. Give one stage all of it.")
    late = [stage.stage for stage in stages[stages.index(storing[0]) + 1 :] if stage.site is LinearSite]
    if late and len(storing) == 1:
        problems.append(f"{name} stores linears for good, so {late[0]} has to come before it.")
    if any(stage.stage == "prune_units" for stage in stages):
        problems.append(
            f"prune_units deletes rows of what {name} has stored by then. Run it first, and {name} on its output."
        )
    factors = any(isinstance(stage, Factorize) and stage.writes_factors for stage in stages)
    if factors and storing[0].model_dump().get("form") == "gguf":
        problems.append("A GGUF file has no factors. Give factorize form: dense (--materialize), or slim another form.")
    open_ranks = any(isinstance(stage, Factorize) and stage.open_ranks for stage in stages)
    opens_types = storing[0].opens == "types"
    if opens_types and any(stage.reshapes or isinstance(stage, Factorize) for stage in stages):
        problems.append("Types under a budget are found for the dense model's own matrices. Run two recipes.")
    elif not opens_types and (has_budget or open_ranks or any(stage.opens for stage in stages)):
        problems.append(
            f"{name} has to know every width and rank beforehand, so a budget or ranks left open are not for this "
            "recipe. Say how much each stage keeps, or run two recipes."
        )
    return problems


def tables_in_full(spec: ModelSpec) -> list[str]:
    """Say what embeddings and head take beside packed linears where they are in the model's dtype."""
    like, dense = next(iter(spec.storage.values()), None), replace(spec, storage={})
    if not spec.is_decided or like is None or like.form != "packed" or like.weights is None:
        return []
    kept = {path: width for path, width in dense.tables if path not in spec.storage}
    if not kept:
        return []
    family, config = spec.architecture.family, dense.config()
    share = sum(kept.values()) * config.vocab_size * spec.dtype.itemsize / spec.size.bytes
    names = [name for path, name in ((family.embeddings[0], "embeddings"), (family.head, "head")) if path in kept]
    remedy = (
        "--head-bits 8 stores the head in fewer" if family.head in kept else "--embedding-bits stores them in fewer"
    )
    if config.tie_word_embeddings:
        names, remedy = ["embeddings, the head too,"], "a GGUF file (--type) stores them in fewer"
    what = " and ".join(names).capitalize()
    return [f"{what} stay in {str(spec.dtype).removeprefix('torch.')}, {share:.0%} of the bytes; {remedy}."]


def alternatives(spec: ModelSpec) -> list[Alternative]:
    """List the plan and unpruned formats: the largest two that are no larger than it, and the next larger one."""
    dense, dtype = replace(spec, storage={path: spec.storage[path] for path in spec.packed_tables}), spec.dtype
    linears = {linear.path: linear for linear in dense.written_linears}
    in_blocks = {path: storage for path, storage in spec.storage.items() if path in linears}
    if spec.is_gguf:
        bits = bits_per_weight(linears, in_blocks, dtype)
        return [Alternative(name="this plan", bits_per_weight=bits, bytes=spec.size.bytes)]
    weights = sum(linears[path].m * linears[path].n for path in in_blocks)
    elsewhere = dense.size.bytes - weights * dtype.itemsize

    def alternative(name: str, stored: Mapping[str, Storage]) -> Alternative:
        bits = bits_per_weight(linears, stored, dtype)
        return Alternative(name=name, bits_per_weight=bits, bytes=elsewhere + round(bits * weights / 8))

    found = [alternative("this plan", in_blocks)]
    if next(iter(spec.storage.values())).pattern is None:
        return found
    unpruned = []
    for adapted, bits in product((True, False), range(2, 9)):
        stored = dict[str, Storage]()
        for path, each in in_blocks.items():
            integers = {"num_bits": bits, "type": "int", "symmetric": True}
            args = (each.weights or QuantizationArgs()).model_copy(update=integers)
            adapter: dict[str, Any] = {"rank": each.rank, "adapter": each.adapter} if adapted else {}
            stored[path] = Storage(each.form, args, **adapter)
        unpruned.append(alternative(f"{bits} bits, unpruned{', the same adapter' if adapted else ''}", stored))
    unpruned.sort(key=lambda each: each.bytes)
    fitting = sum(each.bytes <= found[0].bytes for each in unpruned)
    return [*found, *unpruned[max(0, fitting - 2) : fitting + 1]]


def bits_per_weight(linears: Mapping[str, LinearShape], storage: Mapping[str, Storage], dtype: torch.dtype) -> float:
    """Bits per weight of the stored linears, everything counted but biases."""
    shapes = Counter((stored, linears[path].m, linears[path].n) for path, stored in storage.items())
    total = sum(count * sum(tensor_bytes(*each, dtype).values()) for each, count in shapes.items())
    return 8 * total / sum(count * m * n for (_, m, n), count in shapes.items())
