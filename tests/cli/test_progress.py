"""What a run reports while it runs: counted steps, rates and times left by a fake clock, lines and bars on stderr."""

import io
import time

import pytest
from rich.console import Console

from compress.cli import console
from compress.cli.console import Lines, minutes, progress_bar
from compress.progress import Steps, silent


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    monkeypatch.setattr(console, "memory_in_use", lambda: "1.0 GB")
    return Clock()


# Rates and times.


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599, "59:59"), (3661, "1:01:01")]
)
def test_minutes(seconds, said):
    assert minutes(seconds) == said


def test_a_line_where_a_phase_begins_and_where_it_ends(clock, capsys):
    with progress_bar("preparing", clock=clock) as report:
        clock.now += 12
        steps = Steps(report, "compressing", 3)
        for name in ("embeddings", "block 0", "head"):
            steps.next(name)
            clock.now += 2
        steps.end()
    assert capsys.readouterr().err.splitlines() == [
        "preparing: took 0:12",
        "compressing: 0/3, embeddings, 1.0 GB memory",
        "compressing: 3/3, took 0:06",
    ]


def test_a_line_after_half_a_minute_of_silence_within_a_step(clock, capsys):
    lines = Lines(clock)
    steps = Steps(lines, "compressing", 34, done=4)
    steps.next("block 3")
    for _ in range(3):
        clock.now += 44
        steps.next(f"block {steps.done}")
    capsys.readouterr()
    lines.written = clock()
    clock.now += 29.9
    lines.write_if_due()
    assert capsys.readouterr().err == ""
    clock.now += 0.1
    lines.write_if_due()
    expected = "compressing: 7/34, 19:18 left, 44.0 s/step, block 6 (0:30 so far), 1.0 GB memory\n"
    assert capsys.readouterr().err == expected
    clock.now += 29
    lines.write_if_due()
    assert capsys.readouterr().err == ""


def test_a_thread_speaks_while_the_run_is_silent(clock, monkeypatch, capsys):
    monkeypatch.setattr(console, "INTERVAL", 0.01)
    said, deadline = "", time.monotonic() + 20
    with progress_bar("preparing") as report:
        report("trying shapes", "block 3", 1.5, 4)
        while said.count("trying shapes: 1/4, block 3, 1.0 GB memory") < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
            said += capsys.readouterr().err
    capsys.readouterr()
    time.sleep(0.05)
    assert said.count("trying shapes: 1/4, block 3, 1.0 GB memory") >= 4
    assert capsys.readouterr().err == ""  # it has ended with the run


def test_a_run_that_fails_is_not_said_to_be_over(clock, capsys):
    with pytest.raises(KeyboardInterrupt), progress_bar("preparing", clock=clock):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == ""


def test_of_several_processes_the_first_speaks(monkeypatch, capsys):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    with progress_bar("preparing") as report:
        report("compressing", "block 0", 1, 4)
    assert report is silent
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("width", "seen"), [(80, "2/34, 10:20 left, 20.0 s/step, "), (120, "block 1 (0:20 so far), 1.0 GB memory")]
)
def test_a_bar_a_phase_each_with_its_time(clock, width, seen):
    """On a narrow terminal the end is cut off, not wrapped."""
    screen = Terminal()
    console = Console(file=screen, force_interactive=True, width=width, color_system=None)
    with progress_bar("preparing", console, clock) as report:
        clock.now += 3
        steps = Steps(report, "trying shapes", 9)
        for name in ("a", "b", "c"):
            steps.next(name)
            clock.now += 61
        steps = Steps(report, "compressing [b]", 34)
        for name in ("embeddings", "block 0", "block 1"):
            steps.next(name)
            clock.now += 20
        report.bars.refresh()
        running = screen.getvalue().rpartition("preparing")[2]
    over = screen.getvalue().rpartition("preparing")[2]
    assert seen in running
    rows = [line.split("━") for line in f"preparing{over}".splitlines() if "took" in line]
    assert {row[0].strip(): row[-1].strip() for row in rows} == {
        "preparing": "took 0:03",
        "trying shapes": "2/9, took 3:03",
        "compressing [b]": "2/34, took 1:00",
    }
