"""`--profile`: which kinds of work took the time; test_cli.py has its functions."""

from compress.cli.console import show_seconds


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]


def test_kinds_of_work_add_up(capsys):
    show_seconds({"survey": 2.0, "solve": 5.0, "total": 10.0})
    said = capsys.readouterr()
    assert said.out == ""
    assert rows(said.err) == [
        ["survey", "2.00", "20%"],
        ["solve", "5.00", "50%"],
        ["the rest", "3.00", "30%"],
        ["total", "10.00", ""],
    ]
    show_seconds({"total": 0.0})
    assert rows(capsys.readouterr().err) == [["the rest", "0.00", "0%"], ["total", "0.00", ""]]
