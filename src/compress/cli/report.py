"""`compress report`: a written checkpoint as one HTML page."""

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.options import (
    Device,
    Found,
    Json,
    Output,
    Save,
    TrustRemoteCode,
    computing_dtype,
    in_panel,
    look_at,
    newest_or_refuse,
)
from compress.cli.progress import progress_bar
from compress.cli.reporting import quiet_libraries, reporting_errors
from compress.cli.tables import print_json, print_lines
from compress.errors import Problems, UsageError
from compress.models.hub import find_model

if TYPE_CHECKING:
    from compress.evaluation.windows import Subject
    from compress.inspection.checkpoint import Inspection
    from compress.progress import Progress

SideBySide = "Prompts side by side"
OUT = "The checkpoint's folder. Default: the newest under ./compressed."
AGAINST = "The dense model, which goes on with prompts beside OUT; its quality.json is read, too."
COUNT = "How many of our prompts. Default: 4."
PROMPT = "A prompt of yours in place of ours; may be repeated."
FILE = "The page. Default: report.html in OUT."
NO_PLOTS = "Without plots, which need matplotlib: pip install 'compress-llm[plots]'."
FEW = 4  # prompts


@reporting_errors
def write_report(
    output: Annotated[Path | None, typer.Argument(metavar="OUT", help=OUT, show_default=False)] = None,
    against: Annotated[str | None, in_panel(SideBySide, AGAINST)] = None,
    prompts: Annotated[int | None, in_panel(SideBySide, COUNT, min=1, max=8)] = None,
    prompt: Annotated[list[str] | None, in_panel(SideBySide, PROMPT)] = None,
    out: Annotated[Path | None, in_panel(Output, FILE)] = None,
    save: Save = False,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Write a page about a checkpoint: what was done, size, quality, speed, errors by depth, how to load it.

    Example: compress report compressed/llama-2-7b-anchored-kp0.75 --against llama-2-7b
    """
    folder, problems = output or newest_or_refuse("report"), Problems()
    with problems.collect():
        if against is None and (prompts or prompt or save):
            raise UsageError("--prompts, --prompt and --save are of --against, which names the dense model. Add it.")
    with problems.collect():
        if prompts and prompt:
            raise UsageError("--prompts counts ours and --prompt gives yours. Use one of them.")
    found = look_at(problems, [against] if against else [], data_dir=None, device=device)
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
        print_json({"folder": str(folder), "file": str(file), "bytes": file.stat().st_size, "notes": notes})
    else:
        print_lines([f"wrote {file}", *notes])


def side_by_side(
    seen: "Inspection",
    found: Found,
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
        dtype = computing_dtype(None, subject.config, found.device)
        return open_model(subject.folder, dtype=dtype, device=found.device, trust_remote_code=trust_remote_code)

    dense = subjects[0]
    written = Quality(continuations=compare(dense, subjects[1], prompts, load, progress))
    if save:
        save_quality(seen.folder, written)
    quality = (seen.quality or Quality()).model_copy(update={"continuations": written.continuations})
    notes = other_source(Named(dense.name, dense.folder), Named(seen.name, seen.folder))
    return replace(seen, quality=quality), {"dense": read_quality(dense.folder), "notes": notes}
