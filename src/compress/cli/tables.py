"""Results as tables for people and JSON for machines.

A row is a dict of cells by column. A cell of None is empty; a column of empty cells is left out.
"""

import itertools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from compress.architectures.architecture import Size
    from compress.checkpoints.metadata import ModelSize
    from compress.pipeline.output import Result
    from compress.planning.plan import Plan
    from compress.planning.prepare import Job

Row = Mapping[str, str | None]
ONE_FILE = "one GGUF file, for llama.cpp"
BORDER = 3  # what a table draws around each column
KINDS = {
    "blocks": "blocks",
    "hidden": "hidden size",
    "neurons": "MLP neurons a block",
    "kv_groups": "KV groups a block",
}


def print_json(data: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        Console().print(Text(visible(line)))


def print_values(title: str, values: Row) -> None:
    """A table of labels and values; what has no value is left out."""
    print_rows(title, [{"": label, "value": value} for label, value in values.items() if value is not None])


def print_rows(title: str, rows: Sequence[Row], *, stderr: bool = False) -> None:
    """Text, not rich's markup: what is in a name is shown as it is. Of the columns, all those of the longest row."""
    console = Console(stderr=stderr)
    cells = [{visible(name): visible(cell or "") for name, cell in row.items()} for row in rows]
    for number, names in enumerate(fitting(cells, console.width - 1)):
        table = Table(title=Text(visible(title) + (", continued" if number else "")), title_justify="left")
        for place, name in enumerate(names):
            table.add_column(Text(name), justify="right" if place else "left", overflow="fold")
        for row in cells:
            table.add_row(*(Text(row.get(name, "")) for name in names))
        console.print(table)


def fitting(rows: Sequence[Mapping[str, str]], room: int) -> list[list[str]]:
    """The columns of each table: those that there is no room for go into one below, again after the first column.

    Of a long first column names are folded: to half of the room if all columns fit then, else to three fifths.
    """
    if not rows:
        return []
    names = max(rows, key=len)
    first, *others = [name for name in names if any(row.get(name) for row in rows)] or [""]
    widths = {name: BORDER + max(len(name), *(len(row.get(name, "")) for row in rows)) for name in (first, *others)}
    most = room // 2 if sum(widths[name] for name in others) <= room - room // 2 else 3 * room // 5
    tables: list[list[str]] = []
    left = 0
    for name in others:
        left -= widths[name]
        if not tables or left < 0:
            tables.append([first])
            left = room - min(widths[first], most) - widths[name]
        tables[-1].append(name)
    return tables


# Cells.


gigabytes = decimal  # of bytes: 12.3 MB


def visible(text: object) -> str:
    """Without the control characters, half characters and turns of direction that a file's text may hold."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in str(text))


def number(value: int | float | None, form: str, unit: str = "") -> str | None:
    return None if value is None else format(value, form) + unit


def spans(values: Sequence[int | str]) -> str:
    """Values with repetitions counted: 96 x 8, 128."""
    counts = [(value, len(list(alike))) for value, alike in itertools.groupby(values)]
    return ", ".join(f"{value}" + (f" x {times}" if times > 1 else "") for value, times in counts)


# What a recipe will do to a model, and what it has done.


def show_plan(job: "Job", plan: "Plan", *, as_json: bool) -> None:
    if as_json:
        print_json({"out": str(job.out), **plan.to_dict()})
        return
    alternatives, form = [each.to_dict() for each in plan.alternatives], plan.spec.architecture
    values = {
        "written as": ONE_FILE if plan.spec.is_gguf else loads_as(form.class_name, is_stock=form.is_stock),
        "parameters, dense": f"{plan.dense.parameters:,}",
        **planned(job, plan),
        "bits a weight, all counted": bits(alternatives),
        "memory, at most about": gigabytes(plan.memory_bytes),
        "disk, for the run": gigabytes(plan.disk_bytes),
    }
    print_values(f"Plan: {job.model.name} to {job.out}", values)
    counts = [{KINDS[kind]: f"{count:,}" for kind, count in choice.label.items()} for choice in plan.choices]
    totals = [{"parameters": f"{each.size.parameters:,}", "bytes": gigabytes(each.size.bytes)} for each in plan.choices]
    print_rows("Shapes that fit", [{**kept, **total} for kept, total in zip(counts, totals, strict=True)])
    ranks = {path: factors.rank for path, factors in plan.spec.factors.items()}
    show_linears(ranks, plan.spec.num_blocks, alternatives)
    print_lines(plan.notes)


def planned(job: "Job", plan: "Plan") -> Row:
    """The sizes, or what is to be found before they are known."""
    if plan.choices:
        return {"shapes that fit": f"{len(plan.choices)}, see below; predicted, then chosen by at most three trials"}
    budget, most = job.recipe.budget, dict[str, str]()
    if plan.opens_types and budget is not None:
        most = {"bytes, at most": gigabytes(budget.target_size or 0)}
        if budget.target_latency is not None:
            most = {"decode time, at most": f"{budget.target_latency:g} of the dense model's, in llama.cpp here"}
        what = "types, blocks to leave out" if "blocks" in plan.spec.undecided else "types"
        trials = f" and {budget.trials} trials at most" if budget.trials else ""
        return {what: f"found by a survey{trials}", **most}
    if plan.ranks is not None:
        if budget is not None and budget.target_size is not None:
            most = {"bytes, at most": gigabytes(budget.target_size)}
        elif budget is not None:
            most = {"parameters, at most": f"{int((budget.keep_params or 0) * plan.dense.parameters):,}"}
        return {"ranks": f"found from the dense model, by {' or '.join(plan.ranks.stage.allocations)}", **most}
    if plan.size is None:
        return {"widths": "decided by the data"}
    return {**shape(job, [width or 0 for width in plan.spec.widths], plan.spec.units), **sizes(plan.dense, plan.size)}


def show_result(job: "Job", result: "Result", *, as_json: bool) -> None:
    if as_json:
        print_json(result.to_dict())
        return
    metadata, alternatives = result.metadata, [each.to_dict() for each in result.metadata.alternatives]
    seconds = ", ".join(f"{kind} {value:.1f}" for kind, value in result.seconds.items() if kind != "total")
    values = {
        "written as": ONE_FILE
        if metadata.form == "gguf"
        else loads_as(metadata.architecture, is_stock=metadata.loads_without_our_code),
        **shape(job, result.widths, result.units),
        "parameters, dense": f"{result.dense.parameters:,}",
        **sizes(result.dense, result.size),
        "bits a weight, all counted": bits(alternatives),
        "outputs' energy lost, a linear": number(result.lost, ".2%"),
        "divergence from dense, held out": number(metadata.held_out_divergence, ".3f", " nats a token"),
        "seconds": f"{result.seconds['total']:.1f} ({seconds})",
        "reloads": reloads(result.difference),
    }
    print_values(f"{job.model.name} compressed: {result.out}", values)
    show_linears(result.ranks, result.num_blocks, alternatives)
    rows = [
        {
            "matrices": part.part,
            "types": ", ".join(f"{name} x {count}" for name, count in part.types.items()),
            "bytes": gigabytes(part.bytes),
        }
        for part in metadata.mixture
    ]
    print_rows("Types", rows)
    print_lines(result.notes)


def loads_as(architecture: str, *, is_stock: bool) -> str:
    return f"{architecture} ({'stock: no code of ours' if is_stock else 'ours, its code is carried along'})"


def reloads(difference: float | None) -> str:
    if difference is None:
        return "seen before the run was interrupted"
    return "with the same logits" if difference == 0 else f"with logits within {difference:.0e} of the largest"


def shape(job: "Job", widths: Sequence[int], units: Mapping[str, Any]) -> Row:
    """Of a recipe that changes it."""
    if not any(stage.reshapes for stage in job.recipe.stages):
        return {}
    neurons = units.get("neurons")
    counts = spans(neurons) if isinstance(neurons, tuple) else number(neurons, ",")
    return {"widths": spans(widths), KINDS["neurons"]: counts}


def sizes(dense: "Size | ModelSize", compressed: "Size | ModelSize") -> Row:
    removed = 1 - compressed.parameters / dense.parameters
    share = f"{removed:.1%} removed" if removed >= 0 else f"{-removed:.1%} added"
    return {
        "parameters, compressed": f"{compressed.parameters:,} ({share})",
        "bytes, dense": gigabytes(dense.bytes),
        "bytes, compressed": gigabytes(compressed.bytes),
    }


def bits(alternatives: Sequence[Mapping[str, Any]]) -> str | None:
    """Of the plan, which is the first."""
    return f"{alternatives[0]['bits_per_weight']:.2f}" if alternatives else None


def show_linears(ranks: Mapping[str, int], num_blocks: int, alternatives: Sequence[Mapping[str, Any]]) -> None:
    """Of each linear of a block its ranks from the first block to the last; other ways to store the linears."""
    from compress.inspection.linears import BLOCK

    by_name: dict[str, list[int | str]] = {}
    for path, rank in ranks.items():
        match = BLOCK.search(path)
        assert match is not None
        by_name.setdefault(match[2], ["dense"] * num_blocks)[int(match[1])] = rank
    print_rows("Ranks", [{"linear": name, "by block": spans(each)} for name, each in by_name.items()])
    rows = [
        {"stored as": each["name"], "bits a weight": bits([each]), "bytes": gigabytes(each["bytes"])}
        for each in alternatives
    ]
    print_rows("At about as many bytes", rows if len(rows) > 1 else [])
