"""The size of the package: how large files and functions are, and words that have better ones."""

import ast
import re
import statistics
from pathlib import Path

import compress

ROOT = Path(compress.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# What the code called things before it took the field's words.
REPLACED = r"\b(LinearWatch|Faults|filled_up|is_the_walks|towards|centre[ds]?|colours?|factoris\w+|quantis\w+)\b"


def functions() -> list[int]:
    """Lines of every function."""
    found = (node for file in FILES for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    return [(node.end_lineno or 0) - node.lineno + 1 for node in found if isinstance(node, ast.FunctionDef)]


def test_files_and_functions_keep_their_size(record_property):
    lines = {file: file.read_text(encoding="utf-8").count("\n") for file in FILES}
    lengths = sorted(functions())
    short = [file for file, count in lines.items() if count < 40 and file.parent.name not in ("families", "datasets")]
    counts = {
        "lines": sum(lines.values()),
        "files": len(lines),
        "root modules": len(list(ROOT.glob("*.py"))),
        "median function": statistics.median(lengths),
        "90% of functions": lengths[int(0.9 * len(lengths))],
        "files under 40 lines": len([file for file in short if file.name != "__init__.py"]),
    }
    for name, count in counts.items():
        record_property(name, count)
    assert counts["lines"] <= 27_360
    assert counts["files"] <= 174
    assert counts["root modules"] <= 10
    assert counts["90% of functions"] <= 20
    assert counts["files under 40 lines"] <= 8
    assert max(lines.values()) <= 720


def test_words_that_have_better_ones_do_not_come_back():
    found = [
        f"{file.relative_to(ROOT)}: {match[0]}"
        for file in [*FILES, *ROOT.rglob("*.jinja"), *ROOT.rglob("*.yaml")]
        for match in re.finditer(REPLACED, file.read_text(encoding="utf-8"))
    ]
    assert found == []
