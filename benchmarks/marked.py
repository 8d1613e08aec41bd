"""The places in the docs that a benchmark writes: everything between two marks, `<!-- NAME: begin -->` and its end."""

from pathlib import Path


def write(text: str, file: Path, name: str) -> None:
    """Put a benchmark's report between its marks. Raises SystemExit where the file has none."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    before, _, rest = file.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{file} has no place for it: put the two lines {begin.strip()} and {end.strip()}.")
    file.write_text(before + begin + text + end + after, encoding="utf-8")
