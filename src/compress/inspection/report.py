"""A written checkpoint as one HTML page: what was done, sizes, measures with their commands, plots, prompts, loading.

It is report.html.jinja, filled from compress.json, quality.json and the headers of the files. What the model card says
is said in its words. The page needs no network and has no script; every string that is loaded is escaped.
"""

import importlib.util
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from compress import stages
from compress.checkpoints.card import card_as_html
from compress.checkpoints.metadata import Metadata
from compress.checkpoints.quality import Quality, Rate, Speed
from compress.errors import OutputError, UsageError
from compress.inspection.checkpoint import Inspection, blocks, cells
from compress.inspection.drawing import Drawing, as_svg, byte_text, style
from compress.inspection.plots import (
    plot_bits,
    plot_energy,
    plot_errors,
    plot_ranks,
    plot_search,
    plot_sizes,
    plot_spectra,
)
from compress.io import atomic_write
from compress.version import __version__

REPORT = "report.html"
TEMPLATE = "report.html.jinja"
MARK = '<meta name="generator" content="compress '  # by which a report of ours is told from other files
# What draws each chapter from a checkpoint and the files beside it; a chapter without drawings is left out.
CHAPTERS: dict[str, Sequence[Callable[[Inspection], list[Drawing]]]] = {
    "Error by depth": (plot_errors, plot_energy, plot_spectra),
    "Bits and ranks by layer": (plot_bits, plot_ranks, plot_sizes),
    "The search": (plot_search,),
}
LOOKED_AT = 1000  # bytes
LONGEST = 60  # characters of a stage's setting
LISTED = 12  # values of one


def write_report(file: Path, seen: Inspection, *, dense: Quality | None = None, notes: Sequence[str] = ()) -> None:
    """Write the page about a checkpoint.

    dense: what was measured of the dense model. notes: for the prompts.

    Raises OutputError where the file cannot be written; it is then as it was.
    """
    page = report_page(seen, dense=dense, notes=notes)
    try:
        with atomic_write(file) as unfinished:
            unfinished.write_text(page, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{file} cannot be written ({error.strerror}). Name another file: --out.") from error


def check_target(file: Path) -> None:
    """Raises UsageError where a report would replace something else, or has no folder to lie in."""
    if file.is_dir():
        raise UsageError(f"--out {file} is a folder. Name a file in it, such as {file / REPORT}.")
    if not file.parent.is_dir():
        raise UsageError(f"There is no folder {file.parent} for the report. Make it, or choose another --out.")
    try:
        is_other = False
        if file.exists():
            with file.open("rb") as opened:
                is_other = MARK.encode() not in opened.read(LOOKED_AT)
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror}). Choose another --out.") from error
    if is_other:
        raise UsageError(f"{file} is there and is no report of compress. Choose another --out.")


def report_page(seen: Inspection, *, dense: Quality | None = None, notes: Sequence[str] = ()) -> str:
    metadata, quality = seen.metadata, seen.quality or Quality()
    assert metadata is not None
    card = {name: Markup(text) for name, text in card_as_html(metadata).items()}
    known = {each.name: each.text for each in dense.measures} if dense else {}
    with_plots = importlib.util.find_spec("matplotlib") is not None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        name=seen.name,
        quoted_folder=quoted(seen.folder),
        metadata=metadata,
        version=__version__,
        mark=Markup(MARK),
        card=card,
        stages=[stage_in_words(stage) for stage in metadata.stages],
        numbers=list(key_numbers(seen, quality, known)),
        measured=list(measured(quality, known, seen.folder)),
        speeds=list(speeds(quality, seen.folder)),
        unmeasured=unmeasured(seen, metadata, quality),
        chapters=chapters(seen) if with_plots else {},
        with_plots=with_plots,
        with_errors=any(point.relative_error is not None for point in metadata.points),
        blocks=block_rows(seen),
        continuations=quality.continuations,
        notes=notes,
    )


def chapters(seen: Inspection) -> dict[str, list[Markup]]:
    with style():
        drawn = {title: [drawing for plot in plots for drawing in plot(seen)] for title, plots in CHAPTERS.items()}
        return {title: [Markup(as_svg(drawing)) for drawing in found] for title, found in drawn.items() if found}


# What was done.


def stage_in_words(stage: dict[str, Any]) -> dict[str, str]:
    """What the first line of a stage's class says of it, and the settings that are not the usual ones."""
    name, words, usual = str(stage.get("stage")), "", dict[str, Any]()
    if (kind := stages.classes().get(name)) is not None:
        words = " ".join((kind.__doc__ or "").partition("\n\n")[0].split())
        usual = {key: field.get_default(call_default_factory=True) for key, field in kind.model_fields.items()}
    told = {key: value for key, value in stage.items() if key != "stage" and value != usual.get(key)}
    return {"name": name, "words": words.replace("`", ""), "settings": ", ".join(settings(told))}


def settings(values: dict[str, Any]) -> Iterator[str]:
    """`bits 4`; a flag by its name, what belongs together in one, long lists by their length."""
    for name, value in values.items():
        if value is None or value is False or value == {}:
            continue
        if isinstance(value, dict | list) and len(value) > LISTED:
            yield f"{name} of {len(value)}"
        elif isinstance(value, dict):
            yield f"{name} ({', '.join(settings(value))})"
        elif value is True:
            yield name
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield f"{name} {text[:LONGEST]}"


# Numbers.


def key_numbers(seen: Inspection, quality: Quality, dense: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """A label, a value, and what it is to be seen beside."""
    metadata = seen.metadata
    assert metadata is not None
    size, before = metadata.size, metadata.dense_size
    yield "size", byte_text(size.bytes), f"{size.bytes / before.bytes:.0%} of {byte_text(before.bytes)}"
    share = f"{size.parameters / before.parameters:.0%} of {count_text(before.parameters)}"
    yield "parameters", count_text(size.parameters), share
    if seen.bits_per_weight is not None:
        yield "bits a weight", f"{seen.bits_per_weight:.2f}", "in the blocks, all counted"
    for measure in [each for each in quality.measures if each.name.startswith("perplexity")][:1]:
        beside = f"dense: {dense[measure.name]}" if measure.name in dense else ""
        yield "perplexity", f"{measure.value:.4g}", "; ".join(filter(None, [measure.name.partition(" on ")[2], beside]))
    if quality.divergence:
        yield "KL from dense", f"{quality.divergence[0].kl:.3g}", f"nats a token, {quality.divergence[0].where}"
    elif metadata.held_out_divergence is not None:
        yield "KL from dense", f"{metadata.held_out_divergence:.3g}", "nats a token, calibration text held out"
    for speed in [each for each in quality.speed if {"dense", "compressed"} <= each.decode.keys()][:1]:
        yield "decoding", times(speed.decode), f"as fast as {speed.dense}, batch {speed.batch}"


def count_text(count: int) -> str:
    scales = (("B", 1e9), ("M", 1e6), ("k", 1e3))
    return next((f"{count / scale:.3g} {unit}" for unit, scale in scales if count >= scale), f"{count:,}")


def measured(quality: Quality, dense: dict[str, str], folder: Path) -> Iterator[dict[str, Any]]:
    """Commands, each with what it measured of this model and, where that is known, of the dense one."""
    for part, command in eval_commands(quality, folder):
        rows = [
            {"name": each.name, "value": each.text, "dense": dense.get(each.name), "sample": each.sample}
            for each in part.measures
        ]
        if rows:
            yield {"command": command, "rows": rows}


def eval_commands(quality: Quality, folder: Path) -> Iterator[tuple[Quality, str]]:
    """Measures that are made by one command, and that command."""
    for length, each in by_length(quality.perplexity):
        texts = ",".join(one.dataset for one in each)
        yield Quality(perplexity=each), command(quality, folder, "perplexity", "--ppl", texts, "--seq-len", length)
    for length, each in by_length(quality.divergence):
        texts, dense = ",".join(one.dataset for one in each), each[0].dense
        words = ("--kl", dense, "--ppl", texts, "--seq-len", length)
        yield Quality(divergence=each), command(quality, folder, "divergence", *words)
    if quality.tasks:
        names = ",".join(score.task for score in quality.tasks.scores)
        yield Quality(tasks=quality.tasks), command(quality, folder, "tasks", "--tasks", names)
    if quality.humaneval:
        found = quality.humaneval
        how: tuple[object, ...] = ("--humaneval", "--allow-code-execution")
        if found.samples > 1:
            how += ("--samples-per-problem", found.samples, "--temperature", f"{found.temperature:g}")
            how += ("--k", ",".join(name.removeprefix("pass@") for name in found.rates))
        yield Quality(humaneval=found), command(quality, folder, "humaneval", *how)


def by_length(measures: Sequence[Any]) -> Iterable[tuple[int, list[Any]]]:
    ordered = sorted(measures, key=lambda each: each.seq_len)
    return ((length, list(each)) for length, each in groupby(ordered, key=lambda each: each.seq_len))


def command(quality: Quality, folder: Path, measure: str, *words: object) -> str:
    how = quality.settings.get(measure, {})
    limit = ("--limit", how["limit"]) if isinstance(how.get("limit"), int) else ()
    engine = ("--engine", "llamacpp") if how.get("dtype") == "llama.cpp" else ()
    return quoted("compress", "eval", "--model", folder, *words, *limit, *engine, "--save")


def quoted(*words: object) -> str:
    return shlex.join(map(str, words))


def speeds(quality: Quality, folder: Path) -> Iterator[dict[str, Any]]:
    """As `measured`, of tokens a second."""
    for (_, new, rounds), each in groupby(quality.speed, key=lambda speed: (speed.engine, speed.new, speed.rounds)):
        found = list(each)
        first = found[0]
        batches, prompts = ({str(getattr(speed, name)): None for speed in found} for name in ("batch", "prompt"))
        against = ("--against", first.dense) if first.dense else ()
        engine = ("--engine", "llamacpp") if first.engine == "llamacpp" else ("--batch-sizes", ",".join(batches))
        words = ("--prompt", ",".join(prompts), "--new", new, "--rounds", rounds)
        where = ["llama.cpp" if first.engine == "llamacpp" else None, first.dtype, first.machine]
        yield {
            "command": quoted("compress", "bench", folder, *against, *engine, *words, "--save"),
            "dense": first.dense,
            "where": ", ".join(filter(None, where)),
            "rows": [row for speed in found for row in speed_rows(speed)],
        }


def speed_rows(speed: Speed) -> Iterator[dict[str, str | None]]:
    for name, tokens, rates in (("prefill", speed.prompt, speed.prefill), ("decode", speed.new, speed.decode)):
        texts = {side: rates[side].text if side in rates else None for side in ("dense", "compressed")}
        yield {"name": f"{name}, {speed.batch} x {tokens}", **texts, "ratio": times(rates) if len(rates) > 1 else None}


def times(rates: dict[Any, Rate]) -> str:
    dense = rates["dense"].median
    return f"{rates['compressed'].median / dense:.2f} x" if dense else "not known"


def unmeasured(seen: Inspection, metadata: Metadata, quality: Quality) -> dict[str, str]:
    """What has not been measured yet, by the commands that would."""
    folder, base = seen.folder, metadata.base_model
    text = "stdlib" if base == "demo" else "wikitext2"
    bench = ("--engine", "llamacpp") if seen.is_gguf else ("--against", base)
    commands = {
        "quality": ("compress", "eval", "--model", folder, "--ppl", text, "--kl", base, "--save"),
        "speed": ("compress", "bench", folder, *bench, "--save"),
        "prompts": ("compress", "report", folder, "--against", base, "--save"),
    }
    has = {"quality": quality.measures, "speed": quality.speed, "prompts": quality.continuations}
    return {name: quoted(*words) for name, words in commands.items() if not has[name]}


# By block.


def block_rows(seen: Inspection) -> dict[str, list[str]]:
    """Cells by column, without columns that say nothing."""
    rows = [cells(entry, byte_text) for entry in blocks(seen)]
    columns = {name: [row.get(name) or "" for row in rows] for name in max(rows, key=len, default={})}
    return {name or "part": found for name, found in columns.items() if any(found)}
