"""`--profile`: which functions took the time, and which kinds of work."""

import torch

from cli_runner import flat
from compress.cli.reporting import profiled, show_seconds


def busy() -> None:
    count = 0
    while count < 2_000_000:
        count += 1


def outer() -> None:
    busy()
    torch.ones(4, 4).matmul(torch.ones(4, 4))


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]


def functions(text: str) -> dict[str, tuple[str, float, float]]:
    """By function its calls, its own seconds, and those with what it calls."""
    lines = [line.split(maxsplit=5) for line in text[text.index("ncalls") :].splitlines()[1:] if line.strip()]
    return {name: (calls, float(own), float(all_of_it)) for calls, own, _, all_of_it, _, name in lines}


def test_functions_by_their_own_seconds(capsys):
    with profiled(True):
        outer()
    said = capsys.readouterr()
    found = functions(said.err)
    assert said.out == ""
    assert len(found) <= 10
    (first, (calls, own, all_of_it)), *_ = found.items()
    assert first.startswith("test_profiling.py")
    assert first.endswith("(busy)")
    assert calls == "1"
    assert 0.03 < own <= all_of_it
    (around,) = [each for name, each in found.items() if name.endswith("(outer)")]
    assert around[1] < 0.03 < around[2]
    assert any("'matmul' of 'torch._C.TensorBase'" in name for name in found)


def test_kinds_of_work_add_up(capsys):
    show_seconds({"survey": 2.0, "solve": 5.0, "total": 10.0})
    said = capsys.readouterr()
    assert said.out == ""
    assert "Seconds by kind of work" in flat(said.err)
    assert rows(said.err) == [
        ["survey", "2.00", "20%"],
        ["solve", "5.00", "50%"],
        ["the rest", "3.00", "30%"],
        ["total", "10.00", ""],
    ]
    show_seconds({"total": 0.0})
    assert rows(capsys.readouterr().err) == [["the rest", "0.00", "0%"], ["total", "0.00", ""]]
