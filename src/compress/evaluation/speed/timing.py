"""Seconds of work on a device; two kinds of work in turns, and what pairs of their times say."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """low, high: the quartiles, so that the middle half lies between them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def inverse(self, numerator: int) -> "Spread":
        """Of numerator / value: from seconds to something a second."""
        return Spread(numerator / self.median, numerator / self.high, numerator / self.low)


@dataclass(frozen=True)
class Comparison:
    """Seconds for the same work. speedup: dense / compressed, of each pair; above 1, compressed is faster."""

    dense: Spread
    compressed: Spread
    speedup: Spread

    @classmethod
    def of(cls, pairs: Iterable[tuple[float, float]]) -> "Comparison":
        dense, compressed = zip(*pairs, strict=True)
        ratios = [one / other for one, other in zip(dense, compressed, strict=True)]
        return cls(Spread.of(dense), Spread.of(compressed), Spread.of(ratios))


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """On CUDA between two events, all earlier work done."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start_event.record()
        work()
        end_event.record()
        end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1e3


def in_turns(dense: Callable[[], T], compressed: Callable[[], T], rounds: int) -> list[tuple[T, T]]:
    """Both once a round, the first of the round by turns; one round before them warms up and is not counted.

    So neither has the caches, the clock rate or the neighbors of a better moment to itself.
    """
    dense(), compressed()
    pairs = []
    for number in range(rounds):
        if number % 2:
            second = compressed()
            pairs.append((dense(), second))
        else:
            pairs.append((dense(), compressed()))
    return pairs


def repetitions(work: Callable[[], object], device: torch.device, least: float) -> int:
    """How often work has to be done one after another to take `least` seconds."""
    return max(1, math.ceil(least / max(seconds(work, device), 1e-7)))
