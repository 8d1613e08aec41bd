"""Commands about a written checkpoint: `inspect`, what is in it, `report`, a page about it, `push`, to the hub."""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli import options as opt
from compress.cli import tables
from compress.cli.console import progress_bar, quiet_libraries, reporting_errors
from compress.errors import Problems, UsageError
from compress.errors import report as refuse
from compress.models.hub import find_model

if TYPE_CHECKING:
    from compress.checkpoints.metadata import Metadata
    from compress.evaluation.windows import Subject
    from compress.inspection.checkpoint import Inspection
    from compress.progress import Progress

OUTS = "Checkpoints' folders. Default: the newest under ./compressed."
FAST = "Read headers alone: no checksums verified, no zeros counted."
PLOT = "Folder for plots: errors, ranks and bytes of one checkpoint; size and quality of several."
CARD = "Write the model card again, with what `compress eval --save` measured and the plots in OUT/plots."


@reporting_errors
def inspect_outputs(
    outputs: Annotated[list[Path] | None, typer.Argument(metavar="OUT", help=OUTS)] = None,
    linears: Annotated[bool, typer.Option("--linears", help="A row for each linear.")] = False,
    fast: Annotated[bool, typer.Option("--fast", help=FAST)] = False,
    plot: Annotated[Path | None, typer.Option(help=PLOT)] = None,
    card: Annotated[bool, typer.Option("--card", help=CARD)] = False,
    json: opt.Json = False,
) -> None:
    """Show what is in a checkpoint: widths, ranks, bits, zeros, errors and bytes of each block, checksums verified.

    Example: compress inspect compressed/llama-2-7b-anchored-kp0.75 --plot plots
    """
    folders = outputs or [opt.newest_or_refuse("inspect")]
    if card and len(folders) > 1:
        raise UsageError(f"--card takes one checkpoint, got {len(folders)}. Leave out the others.")
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("Plots need matplotlib. Install it: pip install 'compress-llm[plots]'.")
    if plot is not None and plot.exists() and not plot.is_dir():
        raise UsageError(f"--plot {plot} is a file. Name a folder for the plots.")

    from compress.checkpoints.card import write_card
    from compress.inspection.checkpoint import as_data, inspect

    quiet_libraries()
    problems = Problems()
    with progress_bar("reading") as progress:
        found = [problems.check(inspect, folder, fast=fast, progress=progress) for folder in folders]
    problems.report()
    seen = [each for each in found if each is not None]
    first = seen[0]
    if card and first.metadata is None:
        raise UsageError(f"--card writes the card of a checkpoint of ours, and {first.folder} has no compress.json.")
    if json:
        tables.print_json(as_data(first) if len(seen) == 1 else {"checkpoints": [as_data(each) for each in seen]})
    elif len(seen) > 1:
        tables.print_rows("Checkpoints", [size_cells(each) for each in seen])
    else:
        show(first, linears=linears)
    if plot is not None:
        from compress.inspection.plots import plot_comparison, plot_inspection

        drawn = plot_inspection(first, plot) if len(seen) == 1 else plot_comparison(seen, plot)
        tables.print_lines([] if json else [f"wrote {file}" for file in drawn])
    if card and first.metadata is not None:  # after the plots, which it shows where they lie beside it
        write_card(first.folder, first.metadata, first.quality)


@reporting_errors
def push_output(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint's folder.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="NAME or OWNER/NAME on the hub.")],
    public: Annotated[bool, typer.Option("--public", help="Everybody may see it. Otherwise you alone.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the repository holds.")] = False,
    json: opt.Json = False,
) -> None:
    """Push a checkpoint to the hub, privately, once all its files are verified. The token is that of `hf auth login`.

    Example: compress push compressed/llama-2-7b-anchored-kp0.75 me/llama-2-5b
    """
    from compress.checkpoints.push import push

    with progress_bar("verifying") as progress:
        address = push(output, repository, private=not public, overwrite=overwrite, progress=progress)
    if json:
        tables.print_json({"folder": str(output), "repository": repository, "address": address})
    else:
        tables.print_lines([f"pushed {output} to {address}"])


# A checkpoint as a page.

SideBySide = opt.Panel("Prompts side by side")
REPORTED = "The checkpoint's folder. Default: the newest under ./compressed."
AGAINST = "The dense model, which goes on with prompts beside OUT; its quality.json is read, too."
NO_PLOTS = "Without plots, which need matplotlib: pip install 'compress-llm[plots]'."
FEW = 4  # prompts


@reporting_errors
def write_report(
    output: Annotated[Path | None, typer.Argument(metavar="OUT", help=REPORTED, show_default=False)] = None,
    against: Annotated[str | None, SideBySide(AGAINST)] = None,
    prompts: Annotated[int | None, SideBySide("How many of our prompts. Default: 4.", min=1, max=8)] = None,
    prompt: Annotated[list[str] | None, SideBySide("A prompt of yours in place of ours; may be repeated.")] = None,
    out: Annotated[Path | None, opt.Output("The page. Default: report.html in OUT.")] = None,
    save: opt.Save = False,
    device: opt.Device = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    json: opt.Json = False,
) -> None:
    """Write a page about a checkpoint: what was done, size, quality, speed, errors by depth, how to load it.

    Example: compress report compressed/llama-2-7b-anchored-kp0.75 --against llama-2-7b
    """
    folder, problems = output or opt.newest_or_refuse("report"), Problems()
    broken = []
    if against is None and (prompts or prompt or save):
        broken.append("--prompts, --prompt and --save are of --against, which names the dense model. Add it.")
    if prompts and prompt:
        broken.append("--prompts counts ours and --prompt gives yours. Use one of them.")
    problems.check(refuse, broken)
    found = opt.look_at(problems, [against] if against else [], data_dir=None, device=device)
    problems.report()

    from compress.checkpoints.run_folder import own_metadata
    from compress.evaluation.generation import PROMPTS
    from compress.inspection import report
    from compress.inspection.checkpoint import inspect

    quiet_libraries()
    file = out or folder / report.REPORT
    own_metadata(folder, "reported on")
    report.check_target(file)
    beside = dict[str, Any]()
    with progress_bar("reading") as progress:
        seen = inspect(folder, fast=True, progress=progress)
        if found.models:
            texts = prompt or PROMPTS[: prompts or FEW]
            seen, beside = side_by_side(seen, found, texts, progress, save=save, trust_remote_code=trust_remote_code)
    report.write_report(file, seen, **beside)
    notes = [] if importlib.util.find_spec("matplotlib") else [NO_PLOTS]
    if json:
        tables.print_json({"folder": str(folder), "file": str(file), "bytes": file.stat().st_size, "notes": notes})
    else:
        tables.print_lines([f"wrote {file}", *notes])


def side_by_side(
    seen: "Inspection",
    found: opt.Found,
    prompts: Sequence[str],
    progress: "Progress",
    *,
    save: bool,
    trust_remote_code: bool,
) -> "tuple[Inspection, dict[str, Any]]":
    """The checkpoint with what it and the dense model write; what the page is to have of the dense one."""
    from compress.checkpoints.quality import Quality, read_quality, save_quality
    from compress.evaluation import evaluate
    from compress.evaluation.bench import Named, other_source
    from compress.evaluation.generation import compare
    from compress.models.soundness import free_memory
    from compress.models.stored_loading import open_model

    request, problems, subjects = evaluate.Request(trust_remote_code=trust_remote_code), Problems(), list["Subject"]()
    for source in (*found.models, replace(find_model(str(seen.folder)), name=seen.name)):
        with problems.collect():
            subjects.append(evaluate.prepare(source.name, source.whole_folder(), request))
    problems.report()

    def load(subject: "Subject") -> Any:
        free_memory()
        dtype = opt.computing_dtype(None, subject.config, found.device)
        return open_model(subject.folder, dtype=dtype, device=found.device, trust_remote_code=trust_remote_code)

    dense = subjects[0]
    written = Quality(continuations=compare(dense, subjects[1], prompts, load, progress))
    if save:
        save_quality(seen.folder, written)
    quality = (seen.quality or Quality()).model_copy(update={"continuations": written.continuations})
    notes = other_source(Named(dense.name, dense.folder), Named(seen.name, seen.folder))
    return replace(seen, quality=quality), {"dense": read_quality(dense.folder), "notes": notes}


# A checkpoint as tables.


def show(seen: "Inspection", *, linears: bool) -> None:
    from compress.inspection.checkpoint import as_data, cells

    data, metadata, notes = as_data(seen), seen.metadata, list[str]()
    types = sorted(data["dtypes"].items(), key=lambda item: -item[1]["bytes"])
    said = {"types": ", ".join(f"{name} {tables.gigabytes(entry['bytes'])}" for name, entry in types)}
    if metadata is not None:
        values = origin(seen, metadata, said)
        notes += [f"Made by: {metadata.command}"]
        if metadata.adapter and not any("/" in name for name in metadata.parts):
            notes += ["Of the adapter no checksum is recorded: its names, shapes and bytes are as they should be."]
    else:
        values = {
            "what it is": "a checkpoint of another program",
            "architecture": data["architecture"],
            "quantized by": seen.quantized_by,
            "parameters": tables.number(seen.parameters, ",") or "packed in a way not read here",
            "bytes": tables.gigabytes(seen.bytes),
            **said,
        }
        if seen.quantized_by:
            notes += ["Weights that another program has packed are counted in bytes and not decoded."]
    tables.print_values(str(seen.folder), values)
    tables.print_rows("Blocks", [cells(entry, tables.gigabytes) for entry in data["blocks"]])
    tables.print_rows("Linears", [cells(entry, tables.gigabytes) for entry in data["linears"] if linears])
    tables.print_lines(notes)


def origin(seen: "Inspection", metadata: "Metadata", said: tables.Row) -> tables.Row:
    """What a checkpoint of ours says of itself."""
    tuned, tuning = None, metadata.tuning
    if tuning is not None:
        before, after = math.exp(tuning.held_out.before), math.exp(tuning.held_out.after)
        tuned = f"{tuning.data.source}, perplexity held out {before:.2f} to {after:.2f}"
    packed = metadata.quantized and metadata.form == "packed"
    beside = [name for name, needed in (("peft", metadata.adapter), ("compressed-tensors", packed)) if needed]
    libraries = " and ".join(["transformers", *beside])
    if not metadata.loads_without_our_code:
        libraries += ", after `import compress` or with trust_remote_code"
    architecture = tables.loads_as(metadata.architecture, is_stock=metadata.loads_without_our_code)
    if seen.is_gguf:
        architecture, libraries = tables.ONE_FILE, "llama.cpp; compress, dequantized"
    parts = f"{sum('/' not in name for name in metadata.parts)} parts" + (" and an adapter" if metadata.adapter else "")
    return {
        "base model": metadata.base_model,
        "method": metadata.recipe.method,
        "written as": architecture,
        "loads with": f"compress.load; {libraries}" if metadata.adapter else libraries,
        "parameters, dense": f"{metadata.dense_size.parameters:,}",
        **tables.sizes(metadata.dense_size, metadata.size),
        **said,
        "bits a weight in the blocks": tables.number(seen.bits_per_weight, ".2f", ", all counted"),
        "tuned on": tuned,
        "divergence from dense, held out": tables.number(metadata.held_out_divergence, ".3f", " nats a token"),
        **{each.name: each.text_and_sample for each in (seen.quality.measures if seen.quality else [])},
        "versions": ", ".join(f"{name} {version}" for name, version in metadata.versions.items()),
        "files": parts + (", as they were written (sha256)" if seen.verified else "; --fast verified no checksums"),
    }


def size_cells(seen: "Inspection") -> tables.Row:
    metadata = seen.metadata
    parameters, stored = tables.number(seen.parameters, ","), tables.gigabytes(seen.bytes)
    if metadata is not None:
        size, dense = metadata.size, metadata.dense_size
        parameters = f"{size.parameters:,} ({size.parameters / dense.parameters:.0%})"
        stored += f" ({size.bytes / dense.bytes:.0%})"
    return {
        "": seen.name,
        "parameters (of dense)": parameters,
        "bytes (of dense)": stored,
        "bits a weight": tables.number(seen.bits_per_weight, ".2f"),
        "divergence": tables.number(metadata.held_out_divergence if metadata else None, ".3f"),
    }
