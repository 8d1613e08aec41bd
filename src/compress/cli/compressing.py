"""What the commands that compress a model share: the job's recipe, the run and the command that repeats it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.cli.options import printable, usual_seq_len
from compress.cli.profiling import profiled, show_seconds
from compress.cli.progress import progress_bar
from compress.cli.reporting import print_lines, print_text, seeing_interrupts
from compress.cli.tables import show_plan, show_result

if TYPE_CHECKING:
    from compress.models.hub import ModelSource
    from compress.pipeline import Result
    from compress.planning.prepare import Job
    from compress.recipe import Recipe


def deliver(
    job: "Job",
    *,
    dry_run: bool,
    show_recipe: bool,
    push_to_hub: str | None,
    as_json: bool,
    profile: bool,
    like: Mapping[str, Any] | None = None,
) -> None:
    """Do what was asked for with a job. like: the compress.json of the checkpoint that is to be made again."""
    from compress.checkpoints.push import check_repository, push
    from compress.launch import launch
    from compress.pipeline import plan_only
    from compress.recipe_file import as_yaml, comparison, read_recipe

    if push_to_hub is not None:
        check_repository(push_to_hub)
    if (show_recipe or dry_run) and not launch().is_first:
        return
    if show_recipe:
        print_text(as_yaml(job.recipe))
        return
    if dry_run:
        show_plan(job, plan_only(job), as_json=as_json)
        return
    with profiled(profile):
        result = run_with_progress(job)
    if result is None:
        return
    if profile:
        show_seconds(result.seconds)
    if like is not None:
        made = read_recipe(result.out).facts
        assert made is not None
        result = replace(result, notes=[*result.notes, comparison(like, made)])
    show_result(job, result, as_json=as_json)
    if push_to_hub is not None:
        address = push(result.out, push_to_hub)
        print_lines([] if as_json else [f"pushed to {address}"])


def run_with_progress(job: "Job") -> "Result | None":
    """The result; None in all but the first of several processes, which keep silent."""
    from compress.checkpoints.run_folder import RUN
    from compress.pipeline import run_together
    from compress.streaming.processes import joined

    try:
        with joined(job.device) as processes, seeing_interrupts(), progress_bar("preparing") as progress:
            return run_together(job, processes, progress)
    except KeyboardInterrupt as interrupt:
        if (job.partial / RUN).exists():
            raise KeyboardInterrupt("what was finished is kept; the same command with --resume goes on") from interrupt
        raise


def complete_recipe(
    source: "ModelSource",
    method: str,
    stages: list[dict[str, Any]],
    *,
    calib: str | None,
    samples: int,
    seq_len: int | None,
    **rest: Any,
) -> "Recipe":
    """The recipe with what was left to us: the demo's own text, windows as long as the model takes."""
    from compress.models.loading import load_config
    from compress.recipe import parse_recipe

    calibration = {
        "source": calib or ("stdlib" if source.is_demo else "wikitext2"),
        "samples": samples,
        "seq_len": usual_seq_len(load_config(source.config_folder()), seq_len),
    }
    return parse_recipe({"method": method, "stages": stages, "calibration": calibration, **rest})


def default_output(source: "ModelSource", method: str, amount: str) -> Path:
    return Path("compressed") / f"{source.name.replace('/', '--')}-{method}-{amount}"


def command_line(command: str, method: str, source: "ModelSource", recipe: "Recipe", options: Mapping[str, Any]) -> str:
    """The command that makes the same checkpoint, with every default spelled out."""
    calibration = recipe.calibration
    options = dict(options)
    for flag in ("refit", "bias"):
        if options.get(flag) is False:
            options |= {flag: None, f"no_{flag}": True}
    fixed = {
        "model": source.repository or source.name,
        **options,
        "method": method,
        "calib": calibration.source,
        "samples": calibration.samples,
        "seq_len": calibration.seq_len,
        "seed": recipe.seed,
        "dtype": recipe.dtype,
    }
    return printable(f"compress {command}", fixed)
