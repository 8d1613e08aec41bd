"""What a command says on stderr: progress, errors as one line with an exit code, interrupts, where the time went.

Progress is bars on a terminal, elsewhere lines that are never more than INTERVAL apart:

compressing: 7/34, 19:07 left, 44.0 s/step, block 6 (0:41 so far), 4.1 GB memory
"""

import cProfile
import functools
import pstats
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import ParamSpec

import typer
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from compress.cli.tables import Row, gigabytes, print_rows, visible
from compress.errors import CompressError
from compress.process import launch
from compress.progress import Progress, silent

INTERVAL = 30.0  # seconds between two lines of progress, at most
NOTED = 10.0  # seconds from which on it is said how long the step in progress has been running
Clock = Callable[[], float]

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


# Progress.


@contextmanager
def progress_bar(phase: str, console: Console | None = None, clock: Clock = time.monotonic) -> Iterator[Progress]:
    """What reports on stderr, from the phase that is named on. Of several processes only the first does."""
    if not launch().is_first:
        yield silent
        return
    console = console or Console(stderr=True)
    # FORCE_COLOR makes rich take a log for a terminal.
    shown = Bars(console, clock) if console.is_interactive and console.file.isatty() else Lines(clock)
    with shown.running():
        shown(phase, "", 0, 0)
        yield shown
        shown.end_phase()


class Phase:
    """How far a phase is, how fast, and how long it will still take.

    The time of a step is a mean over the steps seen to begin and end: not over those that an earlier run has done, nor
    over the first one where there are more, which differs (the embeddings, what is loaded and warmed up).
    """

    def __init__(self, name: str, done: float, now: float) -> None:
        self.name, self.started, self.step, self.total = name, now, "", 0
        self.heard = now  # of the step in progress
        self.seconds: float | None = None  # when it is over
        self._marks = [(now, done)]  # the start, the first advance, the last: when, and how many steps were done

    def update(self, step: str, done: float, total: int, now: float) -> None:
        self.step, self.total, self.heard = step, total, now
        if done > self.done:
            self._marks[2:] = [(now, done)]

    @property
    def done(self) -> float:
        return self._marks[-1][1]

    def seconds_per_step(self) -> float | None:
        """None before a step has been done."""
        if len(self._marks) < 2:
            return None
        (start, before), (end, after) = self._marks[-2:]
        return (end - start) / (after - before)

    def seconds_left(self, now: float) -> float | None:
        each = self.seconds_per_step()
        if each is None or not self.total:
            return None
        return max(0.0, (self.total - self.done) * each - min(now - self._marks[-1][0], each))

    def status(self, now: float) -> str:
        """Where it is, how fast, what is left and the memory in use; of one that is over the time it took."""
        count = [f"{int(self.done)}/{self.total}"] if self.total else []
        if self.seconds is not None:
            return ", ".join([*count, f"took {minutes(self.seconds)}"])
        running, each, left = now - self.heard, self.seconds_per_step(), self.seconds_left(now)
        step = visible(self.step) + (f" ({minutes(running)} so far)" if running >= NOTED else "")
        pace = (f"{each:.1f} s/step" if each >= 1 else f"{1 / each:.1f} steps/s") if each else ""
        rest = "" if left is None else f"{minutes(left)} left"
        return ", ".join(filter(None, [*count, rest, pace, step.strip(), f"{memory_in_use()} memory"]))


class Lines:
    """The phases of a run in lines: where one of several steps begins, where any ends, after INTERVAL of silence."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.phase: Phase | None = None
        self.written = clock()

    def __call__(self, phase: str, step: str, done: float, total: int) -> None:
        """A Progress: another name, or a count that begins again, is another phase."""
        now = self.clock()
        is_new = self.phase is None or phase != self.phase.name or done < self.phase.done
        if self.phase is None or is_new:
            self.end_phase()
            self.phase = Phase(phase, done, now)
        self.phase.update(step, done, total, now)
        self.show(self.phase, is_new=is_new)

    def end_phase(self) -> None:
        if self.phase is not None:
            self.phase.seconds = self.clock() - self.phase.started
            self.show(self.phase, is_new=False)

    def show(self, phase: Phase, *, is_new: bool) -> None:
        if (is_new and phase.total) or phase.seconds is not None:
            self.write(phase)

    def write(self, phase: Phase) -> None:
        self.written = now = self.clock()
        sys.stderr.write(f"{visible(phase.name)}: {phase.status(now)}\n")

    def write_if_due(self) -> None:
        if self.phase is not None and self.clock() - self.written >= INTERVAL:
            self.write(self.phase)

    @contextmanager
    def running(self) -> Iterator[None]:
        over = threading.Event()

        def write_when_due() -> None:
            while not over.wait(max(0.0, self.written + INTERVAL - self.clock())):
                self.write_if_due()

        thread = threading.Thread(target=write_when_due, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


class Status(ProgressColumn):
    """What Phase says of itself."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(Column(no_wrap=True, ratio=1))
        self.clock = clock

    def render(self, task: Task) -> Text:
        return Text(task.fields["phase"].status(self.clock()))


class Bars(Lines):
    """A bar for each phase; those that are over stay, with the time they took."""

    def __init__(self, console: Console, clock: Clock) -> None:
        super().__init__(clock)
        columns = TextColumn("{task.description}", markup=False), BarColumn(bar_width=16), Status(clock)
        self.bars = RichProgress(*columns, console=console)
        self.task: TaskID

    def show(self, phase: Phase, *, is_new: bool) -> None:
        if is_new:
            self.task = self.bars.add_task(visible(phase.name), phase=phase)
        # Full where it is over, although trials may end before all shapes are tried.
        done, total = (phase.done, phase.total or None) if phase.seconds is None else (1, 1)
        self.bars.update(self.task, completed=done, total=total)

    @contextmanager
    def running(self) -> Iterator[None]:
        with self.bars:
            yield


def minutes(seconds: float) -> str:
    """Format seconds as h:mm:ss, or m:ss below an hour."""
    whole, rest = divmod(round(seconds), 60)
    hours, whole = divmod(whole, 60)
    return f"{hours}:{whole:02}:{rest:02}" if hours else f"{whole}:{rest:02}"


def memory_in_use() -> str:
    import psutil

    return gigabytes(psutil.Process().memory_info().rss)
