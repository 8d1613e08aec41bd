"""The time and the memory that a walk takes."""

import ctypes
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds by kind of work. A kind inside another counts for itself alone, so the kinds add up to the whole.

    `with clock("forward"): ...` adds to `clock.seconds["forward"]`, waiting for the device's work to end.
    """

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


def return_free_memory() -> None:
    """Give the heap's free pages back (glibc; elsewhere no effect). It takes milliseconds.

    glibc keeps freed blocks of up to 32 MB for later ones. With a decoder block's matrices of just such sizes its heap
    fragments, and the resident set grows with every block although nothing is kept.
    """
    if sys.platform != "linux":
        return
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
