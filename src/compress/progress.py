"""What a long run reports while it runs: the phase it is in, the step in progress, how many steps are done."""

from collections.abc import Callable
from dataclasses import dataclass

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
