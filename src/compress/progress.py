"""What a long run reports while it runs, phases and their steps, and the time and the memory that it takes."""

import ctypes
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Called with
#   phase   what is waited for, such as "compressing"
#   step    what of it is being done now, such as "block 7"; empty where there is nothing to name
#   done    how many steps are finished; a fraction is the finished share of the step in progress
#   total   how many there are; 0 where that is not known
Progress = Callable[[str, str, float, int], None]


def silent(_phase: str, _step: str, _done: float, _total: int) -> None:
    """Report nothing."""


@dataclass
class Steps:
    """Counts the steps of a phase. `total` may grow with what is found out on the way.

    done: of a run that goes on, the steps that an earlier one finished.
    """

    progress: Progress
    phase: str
    total: int
    done: int = 0
    step: str = ""

    def begin(self, step: str, share: float = 0.0) -> None:
        """Report the step in progress. share: of it that is done."""
        self.step = step
        self._report(share)

    def advance(self, count: int = 1) -> None:
        self.done += count
        self._report()

    def next(self, step: str) -> None:
        """Count the step in progress, if there is one, and begin the next."""
        self.done += bool(self.step)
        self.begin(step)

    def end(self) -> None:
        self.done, self.step = self.total, ""
        self._report()

    def _report(self, share: float = 0.0) -> None:
        self.progress(self.phase, self.step, self.done + share, self.total)


class Stopwatch:
    """Seconds by kind of work. A kind inside another counts for itself alone, so the kinds add up to the whole.

    `with clock("forward"): ...` adds to `clock.seconds["forward"]`, waiting for the device's work to end.
    """

    def __init__(self, device: "torch.device") -> None:
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
                import torch

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
