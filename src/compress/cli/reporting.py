"""What a command says on stderr: errors as one line with an exit code, interrupts, where the time went."""

import cProfile
import functools
import pstats
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import ParamSpec

import typer

from compress.cli.tables import Row, print_rows, visible
from compress.errors import CompressError
from compress.launch import launch

INTERRUPTED = 130
MOST_PROBLEMS = 20  # that are told, a line each
LONGEST = 1000  # characters of a line
FIRST_WORD = 5.0  # seconds
FUNCTIONS = 10  # of a profile that are shown
P = ParamSpec("P")


class Interrupts:
    """The handler of signals that ask the process to end. came: whether one has."""

    def __init__(self) -> None:
        self.came = False

    def __call__(self, _signal: int, _frame: FrameType | None) -> None:
        self.came = True
        raise KeyboardInterrupt


INTERRUPTS = Interrupts()


@contextmanager
def seeing_interrupts() -> Iterator[None]:
    """A KeyboardInterrupt again, whatever a library that calls Python from C has made of it."""
    try:
        yield
    except Exception as error:
        if INTERRUPTS.came:
            raise KeyboardInterrupt from error
        raise


def reporting_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Print a CompressError as `error: ...` on stderr, a line a problem, and leave with its exit code."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with seeing_interrupts():
                command(*args, **kwargs)
        except CompressError as error:
            if not launch().is_first:
                # What is wrong is mostly wrong in all processes: the first says so, and the launcher ends the rest.
                time.sleep(FIRST_WORD)
            for line in told(error):
                sys.stderr.write(f"error: {line}\n")
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as interrupt:
            # Commands that keep something say what in the exception.
            if launch().is_first:
                sys.stderr.write(": ".join(["interrupted", *map(str, interrupt.args)]) + "\n")
            raise typer.Exit(INTERRUPTED) from interrupt

    return run


def told(error: CompressError) -> list[str]:
    """The lines of a message. Files and users may have put anything into it."""
    problems = str(error).split("\n")
    more = [f"And {len(problems) - MOST_PROBLEMS} more."] if len(problems) > MOST_PROBLEMS else []
    lines = [visible(problem) for problem in problems[:MOST_PROBLEMS]]
    return [line if len(line) <= LONGEST else f"{line[:LONGEST]}..." for line in lines] + more


def quiet_libraries() -> None:
    """Keep the libraries' own bars and advice out of our output; their errors come through as ours."""
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


# `--profile`.


@contextmanager
def profiled(wanted: bool) -> Iterator[None]:
    """Print the functions that took most of the time, when what is inside is done. Of several processes the first's.

    From Python 3.12 on cProfile sees every thread, and so the one that waits to report progress.
    """
    if not wanted or not launch().is_first:
        yield
        return
    profile = cProfile.Profile()
    with profile:
        yield
    pstats.Stats(profile, stream=sys.stderr).strip_dirs().sort_stats("tottime").print_stats(FUNCTIONS)


def show_seconds(seconds: Mapping[str, float]) -> None:
    """By kind of work, as in the result: each kind without those inside it."""
    kinds = {kind: value for kind, value in seconds.items() if kind != "total"}
    kinds["the rest"] = seconds["total"] - sum(kinds.values())
    whole = seconds["total"] or 1.0  # 0 for a run that had nothing left to do
    rows: list[Row] = [
        {"kind": kind, "seconds": f"{value:.2f}", "share": f"{value / whole:.0%}"} for kind, value in kinds.items()
    ]
    rows += [{"kind": "total", "seconds": f"{seconds['total']:.2f}", "share": None}]
    print_rows("Seconds by kind of work", rows, stderr=True)
