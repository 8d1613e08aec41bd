"""The places in the docs that a benchmark writes: everything between two marks, `<!-- NAME: begin -->` and its end."""

from pathlib import Path


def check(file: Path, name: str) -> None:
    """Raises SystemExit where the file has no marks of that name: before anything is measured."""
    marks = [f"<!-- {name}: {end} -->" for end in ("begin", "end")]
    if not all(mark in file.read_text(encoding="utf-8") for mark in marks):
        raise SystemExit(f"{file} has no place for it: put the two lines {marks[0]} and {marks[1]}.")


def write(text: str, file: Path, name: str) -> None:
    """Put a benchmark's report between its marks. Raises SystemExit where the file has none."""
    check(file, name)
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    before, _, rest = file.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    file.write_text(before + begin + text + end + after, encoding="utf-8")
