"""The errors a user can meet. The command line prints them as one line; anything else is a bug and shows its traceback.

    CompressError            exit 1
    ├── UsageError           exit 2   an option, a recipe or an output folder is wrong
    ├── UnsupportedModel     exit 3   the model cannot be compressed exactly, and why
    ├── Unavailable          exit 4   a model or data set is not on this machine and cannot be fetched
    ├── CheckpointError      exit 1   the input checkpoint is damaged or unsafe
    ├── NumericalError       exit 1   NaN, Inf or a failed factorization, with the tensor's name
    ├── OutputError          exit 1   the output cannot be written
    └── VerificationError    exit 1   the written checkpoint does not reload as it was computed

A message gives the rule, the value, the name and the remedy.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class CompressError(Exception):
    exit_code = 1


class UsageError(CompressError):
    exit_code = 2


class UnsupportedModel(CompressError):
    exit_code = 3


class Unavailable(CompressError):
    exit_code = 4


class CheckpointError(CompressError):
    """The input checkpoint is damaged, incomplete or unsafe to load."""


class NumericalError(CompressError):
    """A NaN, an Inf or a factorization that failed."""


class OutputError(CompressError):
    """The output cannot be written: a full disk, a folder that may not be touched."""


class VerificationError(CompressError):
    """The written checkpoint does not reload as it was computed."""


class Problems:
    """Problems that are looked for one after another and told all at once."""

    def __init__(self) -> None:
        self.found: list[CompressError] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """What is raised in here is kept for `report`."""
        try:
            yield
        except CompressError as problem:
            self.found.append(problem)

    def check(self, find: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> R | None:
        """Call `find`; None where it raises what is kept for `report`."""
        with self.collect():
            return find(*arguments, **named)
        return None

    def report(self) -> None:
        """Raise what was found as one error, a line a problem, of the first one's kind."""
        if self.found:
            raise type(self.found[0])("\n".join(dict.fromkeys(str(problem) for problem in self.found)))


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a name that is not known: what was meant, perhaps, and what there is."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    guess = f" Did you mean {close[0]!r}?" if close else ""
    return f"Unknown {kind} {name!r}.{guess} Available: {', '.join(names)}."


def report(problems: Sequence[str]) -> None:
    """Raises UsageError with all problems, a line each, where there are any."""
    if problems:
        raise UsageError("\n".join(dict.fromkeys(problems)))
