"""Linears by themselves: each of a model beside what stands in its place in a compressed one.

As SLiM reports speed (arXiv 2410.09615, section 4), but over a model's own linears: those of one name and shape are
called one after another, each with its own weights, so that a weight small enough for the caches is not found there.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.evaluation.speed.memory import attempted
from compress.evaluation.speed.timing import Comparison, in_turns, repetitions, seconds
from compress.models.int4 import Int4Linear
from compress.models.packed import ByteLinear, LoraLinear, PackedLinear
from compress.own_model.modeling_compress import AdaptedLinear, CompactLinear, LowRankLinear, PivotLinear

KINDS: tuple[type[nn.Module], ...] = (LowRankLinear, PivotLinear, AdaptedLinear, nn.Linear)
LEAST = 10e-3  # seconds of a measured stretch
NAMES = {  # `kernel`: packed, and multiplied as it is
    nn.Linear: "dense",
    LowRankLinear: "factors",
    PivotLinear: "pivot",
    CompactLinear: "compact",
    Int4Linear: "kernel",
    PackedLinear: "packed",
    ByteLinear: "packed",
}


@dataclass(frozen=True)
class Form:
    """How a linear is stored: n inputs, m outputs.

    bits: of a weight's code; None for floats. pattern: which weights are kept, where only these are stored.
    rank: of the factors, or of the adapter.
    """

    kind: str
    m: int
    n: int
    bits: int | None = None
    pattern: str | None = None
    rank: int = 0

    @classmethod
    def of(cls, linear: Any) -> "Form":
        shape = {"kind": NAMES.get(type(linear), "dense"), "m": linear.out_features, "n": linear.in_features}
        if isinstance(linear, LowRankLinear | PivotLinear):
            factor = cls.of(linear.first)
            shape["kind"] += "" if factor.kind == "dense" else f", {factor.kind}"
            return cls(**shape, bits=factor.bits, pattern=factor.pattern, rank=linear.rank)
        if isinstance(linear, CompactLinear):
            weight = linear.weight
            pattern = f"{weight.keep}:{weight.group}" if weight.keep < weight.group else None
            rank = 0 if linear.first is None else linear.first.num_rows
            return cls(**shape, bits=weight.bits, pattern=pattern, rank=rank)
        if isinstance(linear, LoraLinear):
            rank = 0 if linear.lora_A is None else len(linear.lora_A)
            return cls(**shape, bits=code_bits(linear), rank=rank)
        return cls(**shape)


def code_bits(linear: LoraLinear) -> int | None:
    if isinstance(linear, Int4Linear):
        return 4
    if isinstance(linear, ByteLinear):
        return 8
    return linear.bits if isinstance(linear, PackedLinear) else None


@dataclass(frozen=True)
class Place:
    """Linears of one name, shape and way to be stored, and what stands in their places."""

    name: str
    dense: Sequence[nn.Module]
    compressed: Sequence[nn.Module]

    @property
    def forms(self) -> tuple[Form, list[Form]]:
        """Of the dense ones, which have one; and of the others, whose sizes and ranks may differ by block."""
        return Form.of(self.dense[0]), [Form.of(linear) for linear in self.compressed]


@dataclass(frozen=True)
class LinearSpeed:
    """tokens: rows of the inputs. times: of one linear, the mean over the place's; None where it did not fit."""

    place: Place
    tokens: int
    times: Comparison | None


def linears_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Path and module of each linear; of one that consists of linears, the whole."""
    whole: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if isinstance(module, KINDS) and not path.startswith(whole):
            whole = (*whole, f"{path}.")
            yield path, module


@dataclass(frozen=True)
class Matched:
    """missing: dense linears in whose place there is none. added: linears that stand in no dense one's place."""

    places: list[Place]
    missing: list[str]
    added: list[str]


def matched(dense: nn.Module, compressed: nn.Module) -> Matched:
    """What stands where in both models: our own architecture keeps the names of the stock one."""
    stored = dict(linears_of(compressed))
    groups: dict[Any, tuple[list[Any], list[Any]]] = defaultdict(lambda: ([], []))
    missing = []
    for path, linear in linears_of(dense):
        other = stored.pop(path, None)
        if other is None:
            missing.append(path)
            continue
        ones, others = groups[path.rpartition(".")[2], Form.of(linear), Form.of(other).kind]
        ones.append(linear)
        others.append(other)
    places = [Place(name, *pair) for (name, _, _), pair in groups.items()]
    return Matched(places, missing, list(stored))


Recorder = Callable[[Callable[[], object], torch.device], Callable[[], object]]


def compare_linears(place: Place, inputs: "Inputs", *, rounds: int, record: Recorder | None = None) -> LinearSpeed:
    """record: gives what does the same work, such as a replay of it as a CUDA graph."""

    def pairs() -> list[tuple[float, float]]:
        runs = [caller(linears, inputs, record) for linears in (place.dense, place.compressed)]
        return in_turns(runs[0], runs[1], rounds)

    found = attempted(pairs)
    return LinearSpeed(place, inputs.tokens, None if found is None else Comparison.of(found))


@dataclass(frozen=True)
class Inputs:
    """Random ones, of so many tokens."""

    tokens: int
    dtype: torch.dtype
    device: torch.device

    def of(self, linear: Any) -> Tensor:
        return torch.randn(self.tokens, linear.in_features, dtype=self.dtype, device=self.device)


@torch.inference_mode()
def caller(linears: Sequence[Any], inputs: Inputs, record: Recorder | None) -> Callable[[], float]:
    """What takes the mean seconds of one of the linears, again with every call."""
    by_width = {linear.in_features: inputs.of(linear) for linear in linears}

    @torch.inference_mode()
    def once() -> None:
        for linear in linears:
            linear(by_width[linear.in_features])

    once()  # kernels are chosen, tables made
    all_of_them = record(once, inputs.device) if record else once
    count = repetitions(all_of_them, inputs.device, LEAST)

    def again() -> None:
        for _ in range(count):
            all_of_them()

    def run() -> float:
        assert by_width  # a graph reads the inputs that it was recorded with: they live as long as this
        return seconds(again, inputs.device) / (count * len(linears))

    return run
