"""The table of docs/families.md against what the code plans, from configs alone."""

import re
from pathlib import Path

import pytest

import contract
from compress import families
from contract import COLUMNS, ROWS, Row

PAGE = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
LINES = [cells for line in PAGE.splitlines() if len(cells := line.strip("| ").split(" | ")) == 4 + len(COLUMNS)][1:]
REASONS = re.findall(r"^\d+\. (.*)$", PAGE.partition("<!-- families: begin -->")[2], re.MULTILINE)
# By these alone rows differ from one another, but for what experts and norms behind the branches refuse.
TELLING = ("one basis",)
WHOLE = ("llama", "opt", "gemma2", "mixtral", "qwen3_moe", "opt, 350M: norms behind")


def test_every_row_is_there():
    names = [f"`{row.model_type}`{row.name[len(row.model_type) :]}" for row in ROWS]
    assert [line[0] for line in LINES] == names


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_is_what_the_code_plans(row: Row):
    columns = COLUMNS if row.name in WHOLE else TELLING
    heads = ("model", "rotation", *COLUMNS, "gguf", "reloads to")
    told = dict(zip(heads, LINES[ROWS.index(row)], strict=True))
    expected = [told[name] for name in ("rotation", *columns, "gguf")]
    assert [contract.cell_text(cell, row, REASONS) for cell in contract.cells(row, columns)] == expected


def test_what_is_refused_is_told():
    assert all(f"| `{name}` |" in PAGE for name in families.REFUSED)
