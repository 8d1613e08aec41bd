"""Time by kind of work. Nested kinds count for themselves alone, so that the kinds add up to the whole."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """`with clock("forward"): ...` adds to `clock.seconds["forward"]`, waiting for the device's work to end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside: list[float] = []

    @contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        start = time.perf_counter()
        self._inside.append(0.0)
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            elapsed = time.perf_counter() - start
            self.seconds[kind] += elapsed - self._inside.pop()
            if self._inside:
                self._inside[-1] += elapsed
