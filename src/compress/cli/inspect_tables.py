"""An inspected checkpoint as tables."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from compress.cli.reporting import gigabytes, print_lines, print_table
from compress.cli.tables import loads_as, size_rows, spans

if TYPE_CHECKING:
    from compress.checkpoints.metadata import Metadata
    from compress.inspection.linears import StoredLinear
    from compress.inspection.summary import BlockRow, Inspection

BORDER = 3  # what a table draws around each column
UNITS = {"neurons": "neurons", "kv_groups": "KV"}


def show(seen: "Inspection", *, linears: bool) -> None:
    from compress.inspection.summary import block_rows

    print_table(str(seen.folder), ["", "value"], header(seen))
    show_cells("Blocks", [block_cells(row) for row in block_rows(seen)])
    if linears:
        show_cells("Linears", [linear_cells(linear, seen) for linear in seen.linears])
    print_lines(notes(seen))


def show_cells(title: str, rows: Sequence[dict[str, str]]) -> None:
    """Columns with nothing to say are left out, those that the terminal has no room for go into a table below."""
    told = [name for name in (rows[0] if rows else {}) if any(row[name] for row in rows)]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) + BORDER for name in told}
    room, tables = Console().width - 1, list[list[str]]()
    for name in told[1:]:
        first = told[0]
        if not tables or sum(widths[each] for each in [*tables[-1], name]) > room:
            tables.append([first])
        tables[-1].append(name)
    for number, names in enumerate(tables):
        again = title if number == 0 else f"{title}, continued"
        print_table(again, names, [[row[name] for name in names] for row in rows])


def header(seen: "Inspection") -> list[list[str]]:
    from compress.inspection.summary import architecture

    if seen.metadata is not None:
        return our_header(seen, seen.metadata)
    parameters = "packed in a way not read here" if seen.parameters is None else f"{seen.parameters:,}"
    return [
        ["what it is", "a checkpoint of another program"],
        ["architecture", architecture(seen)],
        *([["quantized by", seen.quantized_by]] if seen.quantized_by else []),
        ["parameters", parameters],
        ["bytes", gigabytes(seen.bytes)],
        ["types", types(seen)],
    ]


def our_header(seen: "Inspection", metadata: "Metadata") -> list[list[str]]:
    rows = [
        ["base model", metadata.base_model],
        ["method", metadata.recipe.method],
        ["written as", loads_as(metadata.architecture, is_stock=metadata.loads_without_our_code)],
        ["loads with", loads_with(metadata)],
        ["parameters, dense", f"{metadata.dense_size.parameters:,}"],
        *size_rows(metadata.dense_size.model_dump(), metadata.size.model_dump()),
        ["types", types(seen)],
    ]
    if seen.bits_per_weight is not None:
        rows += [["bits a weight in the blocks", f"{seen.bits_per_weight:.2f}, all counted"]]
    if metadata.tuning is not None:
        losses = metadata.tuning.held_out
        change = f"{math.exp(losses.before):.2f} to {math.exp(losses.after):.2f}"
        rows += [["tuned on", f"{metadata.tuning.data.source}, perplexity held out {change}"]]
    if metadata.held_out_divergence is not None:
        rows += [["divergence from dense, held out", f"{metadata.held_out_divergence:.3f} nats a token"]]
    if seen.quality is not None:
        rows += [[each.name, each.text] for each in seen.quality.measures]
    versions = ", ".join(f"{name} {version}" for name, version in metadata.versions.items())
    return [*rows, ["versions", versions], ["files", state(seen, metadata)]]


def loads_with(metadata: "Metadata") -> str:
    packed = metadata.quantized and metadata.storage == "packed"
    beside = [name for name, needed in (("peft", metadata.adapter), ("compressed-tensors", packed)) if needed]
    libraries = " and ".join(["transformers", *beside])
    if not metadata.loads_without_our_code:
        libraries += ", after `import compress` or with trust_remote_code"
    return f"compress.load; {libraries}" if metadata.adapter else libraries


def state(seen: "Inspection", metadata: "Metadata") -> str:
    parts = f"{sum('/' not in name for name in metadata.parts)} parts" + (" and an adapter" if metadata.adapter else "")
    return f"{parts}, as they were written (sha256)" if seen.verified else f"{parts}; --fast verified no checksums"


def types(seen: "Inspection") -> str:
    from compress.inspection.summary import dtypes

    found = sorted(dtypes(seen).items(), key=lambda item: -item[1]["bytes"])
    return ", ".join(f"{name} {gigabytes(entry['bytes'])}" for name, entry in found)


def notes(seen: "Inspection") -> Iterable[str]:
    from compress.checkpoints.integrity import ADAPTER_WEIGHTS

    if seen.metadata is not None:
        yield f"Made by: {seen.metadata.command}"
    if seen.metadata is not None and seen.metadata.adapter and ADAPTER_WEIGHTS not in seen.metadata.parts:
        yield "Of the adapter no checksum is recorded: its names, shapes and bytes are as they should be."
    if seen.quantized_by and seen.metadata is None:
        yield "Weights that another program has packed are counted in bytes and not decoded."


def block_cells(row: "BlockRow") -> dict[str, str]:
    return {
        "": row.name,
        "width": spans(list(dict.fromkeys(row.widths))),
        **{name: f"{row.units[kind]:,}" if kind in row.units else "" for kind, name in UNITS.items()},
        "rank": between(row.ranks),
        "bits": between(row.bits),
        "bits a weight": number(row.bits_per_weight, ".2f"),
        "zeros": number(row.zeros, ".1%"),
        "pattern": ", ".join(row.patterns),
        "stream error": number(row.error, ".2%"),
        "lost": number(row.lost, ".2%"),
        "parameters": number(row.parameters, ","),
        "bytes": gigabytes(row.bytes),
    }


def linear_cells(linear: "StoredLinear", seen: "Inspection") -> dict[str, str]:
    zeros = seen.zeros.get(linear.path)
    pattern = "" if zeros is None or zeros.pattern is None else zeros.pattern + ("" if zeros.kept else " broken")
    return {
        "": linear.path,
        "outputs": f"{linear.m:,}",
        "inputs": f"{linear.n:,}",
        "form": linear.form,
        "rank": number(linear.rank, ","),
        "bits": str(linear.bits),
        "bits a weight": f"{linear.bits_per_weight:.2f}",
        "zeros": "" if zeros is None else f"{zeros.share:.1%}",
        "pattern": pattern,
        "lost": number(linear.metadata.lost if linear.metadata else None, ".2%"),
        "parameters": f"{linear.parameters:,}",
        "bytes": gigabytes(linear.bytes),
    }


def number(value: int | float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def between(values: Sequence[int]) -> str:
    """The least and the largest."""
    if not values:
        return ""
    least, largest = min(values), max(values)
    return f"{least}" if least == largest else f"{least} to {largest}"


def show_sizes(seen: "Sequence[Inspection]") -> None:
    show_cells("Checkpoints", [size_cells(each) for each in seen])


def size_cells(seen: "Inspection") -> dict[str, str]:
    metadata = seen.metadata
    size, dense = (metadata.size, metadata.dense_size) if metadata else (None, None)
    parameters, stored = number(seen.parameters, ","), gigabytes(seen.bytes)
    if size and dense:
        parameters += f" ({size.parameters / dense.parameters:.0%})"
        stored += f" ({size.bytes / dense.bytes:.0%})"
    return {
        "": seen.name,
        "parameters (of dense)": parameters,
        "bytes (of dense)": stored,
        "bits a weight": number(seen.bits_per_weight, ".2f"),
        "divergence": number(metadata.held_out_divergence if metadata else None, ".3f"),
    }
