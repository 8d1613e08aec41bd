"""`compress slice`: a narrower residual stream."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from compress.cli.options import (
    BatchSize,
    Calibration,
    DataDir,
    Device,
    Dtype,
    Json,
    Machine,
    Method,
    Output,
    Samples,
    Seed,
    SeqLen,
    in_panel,
    look_at,
    parse_size,
    printable,
    usual_seq_len,
)
from compress.cli.reporting import gigabytes, print_json, print_table, progress_bar, quiet_libraries, reporting_errors
from compress.errors import Faults, UsageError

if TYPE_CHECKING:
    from compress.job import Job
    from compress.models.hub import ModelSource
    from compress.pipeline import Result
    from compress.plan import Plan
    from compress.recipe import Recipe


RATIO = "Share of the hidden size to delete: 0.25; from first to last block, 0.1:0.3; or one a block, 0.1,0.2"
ENERGY = "Instead of --ratio: keep what holds this share of the stream's energy."
SIGNAL = "Principal components of the stream before or after the norm."
ORIENTATION = "Span the kept space by its components, or rotated at random."
ERROR = "Run the dense model beside and report how far the stream is from its own at each point."
CACHE = "Activations beyond this go to disk: 8GB. Default: half of what is free."


@reporting_errors
def slice_model(
    model: Annotated[
        str, typer.Option(help="A hub id, an alias such as llama-2-7b or opt-125m, a folder, or demo.")
    ] = "demo",
    ratio: Annotated[str | None, in_panel(Method, RATIO)] = None,
    explained_variance: Annotated[float | None, in_panel(Method, ENERGY)] = None,
    method: Annotated[
        Literal["slicegpt"], in_panel(Method, "slicegpt: a rotation a layer, as in the paper.")
    ] = "slicegpt",
    signal: Annotated[Literal["stream", "normed"], in_panel(Method, SIGNAL)] = "stream",
    final_orientation: Annotated[Literal["pca", "random"], in_panel(Method, ORIENTATION)] = "pca",
    round_to: Annotated[int, in_panel(Method, "Widths are rounded down to a multiple.", min=1)] = 8,
    slice_head: Annotated[bool, in_panel(Method, "Slice the head's input as well.", flag="--slice-head")] = False,
    calib: Calibration = None,
    samples: Samples = 128,
    seq_len: SeqLen = None,
    data_dir: DataDir = None,
    seed: Seed = 42,
    out: Annotated[Path | None, in_panel(Output, "Output folder. Default: ./compressed/MODEL-METHOD-RATIO.")] = None,
    dtype: Dtype = None,
    resume: Annotated[bool, in_panel(Output, "Go on with an interrupted run.", flag="--resume")] = False,
    overwrite: Annotated[bool, in_panel(Output, "Replace the output if it exists.", flag="--overwrite")] = False,
    measure_error: Annotated[bool, in_panel(Output, ERROR, flag="--measure-error")] = False,
    dry_run: Annotated[
        bool, in_panel(Output, "Show sizes and needs from config.json alone.", flag="--dry-run")
    ] = False,
    json: Json = False,
    device: Device = None,
    batch_size: BatchSize = None,
    cache_memory: Annotated[str | None, in_panel(Machine, CACHE)] = None,
) -> None:
    """Slice a model: rotate its residual stream to its principal components and delete the least (SliceGPT).

    Example: compress slice --model llama-2-7b --ratio 0.25
    """
    faults = Faults()
    with faults.noted():
        rule = slicing_rule(ratio, explained_variance)
    with faults.noted():
        cache_bytes = None if cache_memory is None else parse_size(cache_memory, "--cache-memory")
    source, data_folder, target = look_at(faults, model=model, dtype=dtype, data_dir=data_dir, device=device)

    from compress.job import Job
    from compress.pipeline import plan_only
    from compress.recipe import slicegpt

    quiet_libraries()
    how: dict[str, Any] = {
        "signal": signal,
        "final_orientation": final_orientation,
        "round_to": round_to,
        "slice_head": slice_head,
        "measure_error": measure_error,
    }
    recipe = complete_recipe(
        source, method, slicegpt(rule, **how), calib=calib, samples=samples, seq_len=seq_len, seed=seed, dtype=dtype
    )
    amount = {"ratio": ratio, "explained_variance": explained_variance}
    job = Job(
        model=source,
        recipe=recipe,
        out=out or default_output(source, method, amount),
        command=command_line(source, recipe, {**amount, **how, "batch_size": batch_size}),
        device=target,
        batch_size=batch_size,
        cache_memory=cache_bytes,
        data_dir=data_folder,
        resume=resume,
        overwrite=overwrite,
    )
    if dry_run:
        show_plan(job, plan_only(job), as_json=json)
    else:
        show_result(job, run_with_progress(job), as_json=json)


def run_with_progress(job: "Job") -> "Result":
    from compress.pipeline import run

    try:
        with progress_bar("preparing") as progress:
            return run(job, progress)
    except KeyboardInterrupt as interrupt:
        if job.partial.exists():
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


def default_output(source: "ModelSource", method: str, amount: Mapping[str, Any]) -> Path:
    size = amount["ratio"] or f"ev{amount['explained_variance']}"
    if len(size) > 40:
        # A ratio for each of many blocks is longer than a file's name may be.
        size = f"ratios-{hashlib.sha256(size.encode()).hexdigest()[:8]}"
    return Path("compressed") / f"{source.name.replace('/', '--')}-{method}-{size.replace(':', '-')}"


def command_line(source: "ModelSource", recipe: "Recipe", options: Mapping[str, Any]) -> str:
    """The command that makes the same checkpoint, with every default spelled out."""
    calibration = recipe.calibration
    fixed = {
        "model": source.repository or source.name,
        **options,
        "method": recipe.method,
        "calib": calibration.source,
        "samples": calibration.samples,
        "seq_len": calibration.seq_len,
        "seed": recipe.seed,
        "dtype": recipe.dtype,
    }
    return printable("compress slice", fixed)


def slicing_rule(ratio: str | None, explained_variance: float | None) -> dict[str, Any]:
    """How `slice` is told to choose widths, from what was typed."""
    if (ratio is None) == (explained_variance is None):
        raise UsageError("Say how much to slice: --ratio 0.25 or --explained-variance 0.99, one of the two.")
    if explained_variance is not None:
        if not 0 < explained_variance <= 1:
            raise UsageError(
                f"--explained-variance is a share above 0 and up to 1, got {explained_variance}. Try 0.99."
            )
        return {"explained_variance": explained_variance}
    assert ratio is not None
    if ":" in ratio:
        ends = parse_ratios(ratio, ":")
        if len(ends) != 2:
            raise UsageError(f"--ratio FIRST:LAST takes two numbers, got {ratio!r}. Try 0.1:0.3.")
        return {"linear_ratios": ends}
    if "," in ratio:
        return {"block_ratios": parse_ratios(ratio, ",")}
    (single,) = parse_ratios(ratio, None)
    if single == 0:
        raise UsageError("--ratio is a share above 0 and below 1, got 0. 0.25 deletes a quarter of the hidden size.")
    return {"ratio": single}


def parse_ratios(text: str, separator: str | None) -> list[float]:
    ratios = []
    for word in text.split(separator) if separator else [text]:
        try:
            ratio = float(word)
        except ValueError as error:
            raise UsageError(f"--ratio is a number such as 0.25, got {word!r}.") from error
        if not 0 <= ratio < 1:
            raise UsageError(
                f"--ratio is a share above 0 and below 1, got {word}. 0.25 deletes a quarter of the hidden size."
            )
        ratios.append(ratio)
    return ratios


def show_plan(job: "Job", plan: "Plan", *, as_json: bool) -> None:
    if as_json:
        print_json({"out": str(job.out), **plan.to_dict()})
        return
    rows = [
        ["widths", "decided by the data" if plan.sliced is None else spans([width or 0 for width in plan.widths])],
        ["parameters, dense", f"{plan.dense.parameters:,}"],
    ]
    if plan.sliced is not None:
        rows += size_rows(vars(plan.dense), vars(plan.sliced))
    rows += [["memory, at most about", gigabytes(plan.memory_bytes)], ["disk, for the run", gigabytes(plan.disk_bytes)]]
    print_table(f"Plan: {job.model.name} to {job.out}", ["", "value"], rows)


def show_result(job: "Job", result: "Result", *, as_json: bool) -> None:
    if as_json:
        print_json(result.to_dict())
        return
    rows = [["widths", spans(result.widths)], ["parameters, dense", f"{result.dense.parameters:,}"]]
    rows += size_rows(vars(result.dense), vars(result.size))
    seconds = result.seconds
    shares = ", ".join(f"{kind} {value:.1f}" for kind, value in seconds.items() if kind != "total")
    rows += [
        ["seconds", f"{seconds['total']:.1f} ({shares})"],
        ["reloads", reloads(result.difference)],
    ]
    print_table(f"{job.model.name} sliced: {result.out}", ["", "value"], rows)


def reloads(difference: float | None) -> str:
    if difference is None:
        return "seen before the run was interrupted"
    return "with the same logits" if difference == 0 else f"with logits within {difference:.0e} of the largest"


def size_rows(dense: Mapping[str, int], sliced: Mapping[str, int]) -> list[list[str]]:
    removed = 1 - sliced["parameters"] / dense["parameters"]
    share = f"{removed:.1%} removed" if removed >= 0 else f"{-removed:.1%} added"
    return [
        ["parameters, sliced", f"{sliced['parameters']:,} ({share})"],
        ["bytes, dense", gigabytes(dense["bytes"])],
        ["bytes, sliced", gigabytes(sliced["bytes"])],
    ]


def spans(widths: list[int]) -> str:
    """Widths with repetitions counted: 96 x 8, 128."""
    parts: list[str] = []
    start = 0
    for i in range(1, len(widths) + 1):
        if i == len(widths) or widths[i] != widths[start]:
            parts.append(f"{widths[start]}" + (f" x {i - start}" if i - start > 1 else ""))
            start = i
    return ", ".join(parts)
