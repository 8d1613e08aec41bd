"""`compress inspect`: what is in a checkpoint, verified and measured from its files."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli.inspect_tables import show, show_sizes
from compress.cli.options import Json, newest_output
from compress.cli.progress import progress_bar
from compress.cli.reporting import print_json, print_lines, quiet_libraries, reporting_errors
from compress.errors import Problems, UsageError

if TYPE_CHECKING:
    from compress.inspection.summary import Inspection


@reporting_errors
def inspect_outputs(
    outputs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="OUT", help="Checkpoints' folders. Default: the newest under ./compressed."),
    ] = None,
    linears: Annotated[bool, typer.Option("--linears", help="A row for each linear.")] = False,
    fast: Annotated[
        bool, typer.Option("--fast", help="Read headers alone: no checksums verified, no zeros counted.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Folder for plots: errors, ranks and bytes of one checkpoint; size and quality of several."),
    ] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Write the model card again, with what `compress eval --save` measured.")
    ] = False,
    json: Json = False,
) -> None:
    """Show what is in a checkpoint: widths, ranks, bits, zeros, errors and bytes of each block, checksums verified.

    Example: compress inspect compressed/llama-2-7b-anchored-kp0.75 --plot plots
    """
    folders = outputs or [newest()]
    if card and len(folders) > 1:
        raise UsageError(f"--card takes one checkpoint, got {len(folders)}. Leave out the others.")
    if plot is not None:
        check_plots(plot)

    from compress.inspection.summary import as_data

    quiet_libraries()
    seen = look_into(folders, fast=fast)
    if card:
        write_card(seen[0])
    if json:
        print_json(as_data(seen[0]) if len(seen) == 1 else {"checkpoints": [as_data(each) for each in seen]})
    elif len(seen) > 1:
        show_sizes(seen)
    else:
        show(seen[0], linears=linears)
    if plot is not None:
        drawn = draw(seen, plot)
        if not json:
            print_lines([f"wrote {file}" for file in drawn])


def newest() -> Path:
    found = newest_output()
    if found is None:
        raise UsageError("There is no output under ./compressed. Name a checkpoint: compress inspect OUT.")
    return found


def check_plots(folder: Path) -> None:
    """That plots can be drawn, before anything is read."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("Plots need matplotlib. Install it: pip install 'compress-llm[plots]'.")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--plot {folder} is a file. Name a folder for the plots.")


def look_into(folders: Sequence[Path], *, fast: bool) -> "list[Inspection]":
    """All of them; what is wrong with any is told with the problems of the others."""
    from compress.inspection.summary import inspect

    problems, seen = Problems(), []
    with progress_bar("reading") as progress:
        for folder in folders:
            with problems.collect():
                seen.append(inspect(folder, fast=fast, progress=progress))
    problems.report()
    return seen


def write_card(seen: "Inspection") -> None:
    from compress.checkpoints.card import write_card

    if seen.metadata is None:
        raise UsageError(f"--card writes the card of a checkpoint of ours, and {seen.folder} has no compress.json.")
    write_card(seen.folder, seen.metadata, seen.quality)


def draw(seen: "Sequence[Inspection]", folder: Path) -> list[Path]:
    from compress.inspection.plots import plot_comparison, plot_inspection

    return plot_inspection(seen[0], folder) if len(seen) == 1 else plot_comparison(seen, folder)
