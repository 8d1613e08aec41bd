"""Every family by every method, on tiny random models: what comes out, written into the docs.

    python benchmarks/family_table.py --write docs/families.md
    python benchmarks/family_table.py --plan --write docs/families.md      nothing is run, nothing measured

Each cell is a whole run of the pipeline; a clean process, which has no code of ours, loads what a family's runs have
written and generates. The program ends with an error where a run gives anything but what the code plans. Rows and
methods are those of tests/contract.py.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import marked

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import contract


def measure(row: contract.Row, folder: Path) -> float:
    """The largest difference on reload of all the row's runs. Raises SystemExit where a run is not as planned."""
    contract.write_inputs(folder, [row], torch.float64)
    written = {}
    for number, (name, method) in enumerate(contract.METHODS.items()):
        expected = contract.cell(row, method)
        if expected.kind == "refused":
            continue
        written[name] = contract.write(row, method, folder, folder / f"out-{number}")
        found = contract.written_kind(written[name].out, row.model_type)
        if found != expected.kind:
            raise SystemExit(f"{row.name}, {name}: {found} was written, {expected.kind} was planned.")
    looked = contract.look_at(written, folder)
    for name, made in written.items():
        looked.agrees(name, made)
    return max(looked.difference(name, made) for name, made in written.items())


def head(measured: bool) -> str:
    if not measured:
        return "As planned; nothing of it has been run (`python benchmarks/family_table.py --plan`).\n\n"
    versions = f"torch {version('torch')}, transformers {version('transformers')}"
    command = "python benchmarks/family_table.py --write docs/families.md"
    return f"Date: {date.today().isoformat()}. {versions}, float64, no GPU.\n\n    {command}\n\n"


def table(rows: Sequence[contract.Row], differences: Mapping[str, float]) -> str:
    """The section's table and its reasons; differences: of the rows that have been run, by name."""
    notes: list[str] = []
    heads = ["model", "rotation", *contract.COLUMNS.values(), "--export gguf", "reloads to"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        texts = [contract.cell_text(found, row, notes) for found in contract.cells(row)]
        measured = f"{differences[row.name]:.0e}" if row.name in differences else "not run"
        lines.append(f"| {' | '.join([f'`{row.model_type}`' + row.name[len(row.model_type) :], *texts, measured])} |")
    reasons = [f"{number}. {words}" for number, words in enumerate(notes, start=1)]
    return "\n".join([*lines, "", *reasons]) + "\n"


def section(rows: Sequence[contract.Row], *, plan: bool) -> str:
    differences: dict[str, float] = {}
    for row in [] if plan else rows:
        with tempfile.TemporaryDirectory() as scratch:
            differences[row.name] = measure(row, Path(scratch))
        print(f"{row.name}: {differences[row.name]:.0e}", flush=True)
    return head(not plan) + table(rows, differences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--plan", action="store_true")
    options = parser.parse_args()
    text = section(contract.ROWS, plan=options.plan)
    if options.write is None:
        print(text)
        return
    marked.write(text, options.write, "families")


if __name__ == "__main__":
    main()
