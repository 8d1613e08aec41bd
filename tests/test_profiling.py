"""`--profile`: which functions took the time, and which kinds of work."""

import torch

from cli_runner import flat
from compress.cli.profiling import profiled, show_seconds


def busy() -> None:
    count = 0
    while count < 2_000_000:
        count += 1


def outer() -> None:
    busy()
    torch.ones(4, 4).matmul(torch.ones(4, 4))


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]


def test_functions_by_their_own_seconds(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with profiled(True):
        outer()
    said = capsys.readouterr()
    found = {name: (calls, float(own), float(all_of_it)) for name, calls, own, all_of_it in rows(said.err)}
    assert said.out == ""
    assert len(found) <= 10
    first = next(iter(found))
    assert first == "test_profiling:busy"
    calls, own, all_of_it = found["test_profiling:busy"]
    assert calls == "1"
    assert 0.03 < own <= all_of_it
    assert found["test_profiling:outer"][1] < 0.03 < found["test_profiling:outer"][2]
    assert "torch._C.TensorBase:matmul" in found


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
