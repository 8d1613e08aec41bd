"""Linears by themselves: each of a model beside what stands in its place in a compressed one.

As SLiM reports speed (arXiv 2410.09615, section 4), but over a model's own linears: those of one name and shape are
called one after another, each with its own weights, so that a weight small enough for the caches is not found there.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark import Timer

from compress.evaluation.speed.generation import attempted, compared, in_turns
from compress.models.storage import Form, linears_of

LEAST = 10e-3  # seconds of a measured stretch
Recorder = Callable[[Callable[[], object], torch.device], Callable[[], object]]


@dataclass(frozen=True)
class Place:
    """Linears of one name, shape and way to be stored, and what stands in their places."""

    name: str
    dense: Sequence[Any]
    compressed: Sequence[Any]

    @property
    def forms(self) -> tuple[Form, list[Form]]:
        """Of the dense ones, which have one; and of the others, whose sizes and ranks may differ by block."""
        return Form.of(self.dense[0]), [Form.of(linear) for linear in self.compressed]


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


def compare_linears(
    place: Place,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    rounds: int,
    record: Recorder = lambda work, _device: work,
) -> dict[str, Any]:
    """Seconds of one linear, the mean over the place's, on random inputs; None where memory did not hold it.

    record: gives what does the same work, such as a replay of it as a CUDA graph.
    """

    def pairs() -> list[tuple[float, float]]:
        # A graph reads the inputs that it was recorded with: they live as long as the pairs are measured.
        widths = {linear.in_features for linear in (*place.dense, *place.compressed)}
        inputs = {width: torch.randn(tokens, width, dtype=dtype, device=device) for width in widths}
        dense, compressed = (caller(linears, inputs, device, record) for linears in (place.dense, place.compressed))
        return in_turns(dense, compressed, rounds)

    found = attempted(pairs)
    dense, stored = place.forms
    return {
        "name": place.name,
        "linears": len(stored),
        "tokens": tokens,
        "dense": asdict(dense),
        "compressed": [asdict(form) for form in dict.fromkeys(stored)],
        **({"seconds": None, "speedup": None} if found is None else compared(found)),
    }


@torch.inference_mode()
def caller(
    linears: Sequence[Any], inputs: dict[int, torch.Tensor], device: torch.device, record: Recorder
) -> Callable[[], float]:
    """What takes the mean seconds of one of the linears, again with every call."""

    @torch.inference_mode()
    def once() -> None:
        for linear in linears:
            linear(inputs[linear.in_features])

    calls = {"all_of_them": record(once, device)}
    timed = Timer("all_of_them()", globals=calls, num_threads=torch.get_num_threads())
    # Each time after two calls at least that are not counted: kernels are chosen, tables made.
    count = max(1, math.ceil(LEAST / timed.timeit(1).mean))
    return lambda: timed.timeit(count).mean / len(linears)
