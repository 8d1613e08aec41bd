"""The table of docs/families.md against what the code plans, from configs alone."""

import re
from pathlib import Path

import contract
from compress import families

PAGE = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")
MEASURED = re.compile(r"\| [^|]* \|$", re.MULTILINE)


def unmeasured(table: str) -> list[str]:
    """The lines of a table and its reasons without the last column, which only a run can tell."""
    return [MEASURED.sub("|", line) for line in table.strip().splitlines()]


def test_the_table_is_what_the_code_plans():
    section = PAGE.partition("<!-- families: begin -->\n")[2].partition("<!-- families: end -->")[0]
    written = section[section.index("| model |") :]
    assert unmeasured(written) == unmeasured(contract.table(contract.ROWS, {}))


def test_what_is_refused_is_told():
    assert all(f"| `{name}` |" in PAGE for name in families.REFUSED)
