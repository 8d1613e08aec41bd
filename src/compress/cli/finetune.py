"""`compress finetune`: what a compressed checkpoint has lost, won back by a little training."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from compress.cli import options as opt
from compress.cli.compressing import keeping_what_is_done
from compress.cli.console import profiled, progress_bar, quiet_libraries, reporting_errors
from compress.cli.recipes import plain_value
from compress.cli.tables import gigabytes, print_json, print_lines, print_values, reloads
from compress.errors import Problems, UsageError
from compress.models.hub import find_model

if TYPE_CHECKING:
    from compress.tuning.looking import Prepared
    from compress.tuning.settings import Settings
    from compress.tuning.tuner import Result

SEQ_LEN = 1024
TRAINED = {"lora": "a LoRA", "factors": "the factors", "adapters": "the adapters", "all": "all weights"}

DATA = "alpaca, wikitext2, stdlib, c4, ptb, or a .txt or .jsonl file. Default: the calibration text."
TRAIN = "Trainable parameters. Default: the adapters or the factors where there are any, else a LoRA."
DISTILL = "logits: KL divergence from the dense model. none: cross-entropy of the text's next tokens. Default: logits."
TEACHER = "The dense model to distill from. Default: the one that compress.json names."
MERGE = "Merge a LoRA into the weights, or keep it as an adapter. Default: merge, where weights keep their form."
SET = (
    "Change a setting that has no option: epochs, eval_every (50), patience (5), lora_alpha (the rank), warmup (0.05), "
    "gradient_checkpointing (false); several times."
)
DTYPE = "Dtype of frozen weights in memory. Default, and least, on the CPU: float32; on a GPU their own."


LENGTH = f"Tokens per sequence. Default: {SEQ_LEN}, or what the model has."
RATE = "Peak learning rate. Default: by what is trained and its size."
BATCH = "Sequences per step, over all processes. Default: 16."
Trained = Literal["lora", "factors", "adapters", "all"]


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(opt.WritingOptions):
    """What they set are fields of `Settings`."""

    data: Annotated[str | None, opt.Data(DATA, sets="data")] = None
    seq_len: Annotated[int | None, opt.Data(LENGTH, sets="seq_len")] = None
    steps: Annotated[int | None, opt.Method("Training length in steps. Default: 400.", sets="steps")] = None
    tokens: Annotated[int | None, opt.Method("Training length in tokens.", sets="tokens")] = None
    train: Annotated[Trained | None, opt.Method(TRAIN, sets="train")] = None
    distill: Annotated[Literal["none", "logits"] | None, opt.Method(DISTILL, sets="distill")] = None
    teacher: Annotated[str | None, opt.Method(TEACHER)] = None
    lora_rank: Annotated[int | None, opt.Method("Rank of a new LoRA. Default: 32.", sets="lora_rank")] = None
    lr: Annotated[float | None, opt.Method(RATE, sets="lr")] = None
    merge: Annotated[bool | None, opt.Method(MERGE, "--merge/--no-merge", sets="merge")] = None
    set_: Annotated[list[str] | None, opt.Method(SET, "--set", metavar="FIELD=VALUE")] = None
    out: Annotated[Path | None, opt.Output("Output folder. Default: ./compressed/NAME-tuned.")] = None
    batch_size: Annotated[int | None, opt.Machine(BATCH, sets="batch_size")] = None
    dtype: Annotated[str | None, opt.Machine(DTYPE)] = None

    def settings(self, usual_data: str = "", config: Any = None) -> "Settings":
        """Raises UsageError with all that is wrong, each with what put it there."""
        from compress.tuning.settings import parse_settings

        values: dict[str, Any] = {"data": usual_data, "seq_len": opt.usual_seq_len(config, None, SEQ_LEN)}
        typed = {name: value for name, value, _ in self.in_recipe}
        flags = {name: words for name, _, words in self.in_recipe}
        for text in self.set_ or []:
            name, equals, value = text.partition("=")
            if not equals:
                raise UsageError(f"--set {text}: write FIELD=VALUE, such as --set warmup=0.1.")
            typed[name.strip()], flags[name.strip()] = plain_value(value.strip()), f"--set {text}"
        return parse_settings(values | typed, flags)


@reporting_errors
@opt.with_options(FinetuneOptions)
def finetune(
    run: FinetuneOptions,
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="The compressed checkpoint's folder.")],
) -> None:
    """Finetune a compressed checkpoint to recover what it has lost. It keeps its form, its shapes and its size.

    Example: compress finetune compressed/llama-2-7b-anchored-kp0.75 --data alpaca
    """
    problems = Problems()
    with problems.collect():
        if run.teacher is not None and run.distill == "none":
            raise UsageError("--teacher has no effect with --distill none. Leave one out.")
    asked: dict[str, Any] = {"dtype": run.dtype, "data_dir": run.data_dir, "device": run.device}
    found = opt.look_at(problems, [str(folder)], **asked, check=run.settings)
    problems.report()

    import torch

    from compress.checkpoints.run_folder import own_metadata
    from compress.models.loading import load_config
    from compress.tuning.looking import look
    from compress.tuning.settings import TuningJob
    from compress.tuning.tuner import tune

    quiet_libraries()
    metadata, (source,) = own_metadata(folder, "tuned"), found.models
    try:
        teacher = None if run.distill == "none" else find_model(run.teacher or metadata.base_model)
    except UsageError as error:
        if run.teacher:
            raise
        raise UsageError(
            f"The dense model is not found by its name in compress.json, {metadata.base_model!r}. "
            "Name its folder with --teacher, or train on the text alone with --distill none."
        ) from error
    job = TuningJob(
        model=source,
        settings=run.settings(metadata.recipe.calibration.source, load_config(folder).get_text_config()),
        teacher=teacher,
        out=run.out or Path("compressed") / f"{source.name}-tuned",
        command=run.command(f"finetune {source.name}"),
        dtype=None if run.dtype is None else getattr(torch, run.dtype),
        device=found.device,
        data_dir=found.data_dir,
        resume=run.resume,
        overwrite=run.overwrite,
    )
    if run.dry_run:
        show_plan(look(job), as_json=run.json)
        return
    with (
        profiled(run.profile),
        keeping_what_is_done("what was trained is kept", job.partial.exists),
        progress_bar("preparing") as progress,
    ):
        result = tune(job, progress)
    if result is not None and run.json:
        print_json(result.to_dict())
    elif result is not None:
        show_tuning(result)


def show_plan(prepared: "Prepared", *, as_json: bool) -> None:
    settings, job = prepared.job.settings, prepared.job
    teacher = None if job.teacher is None else job.teacher.name
    if as_json:
        trained = {"trained": prepared.what, "trained_parameters": prepared.num_trained, "merge": prepared.merge}
        size = {"steps": prepared.steps, "windows": len(prepared.texts.train), "seq_len": settings.seq_len}
        rate = {"learning_rate": prepared.rate.highest, "relative_rate": prepared.rate.relative, "teacher": teacher}
        print_json({"out": str(job.out), **trained, **size, "batch_size": settings.batch_size, **rate})
        return
    values = {
        "trained": f"{TRAINED[prepared.what]}, {prepared.num_trained:,} parameters",
        "steps": f"{prepared.steps:,} of {settings.batch_size} sequences of {settings.seq_len} tokens",
        "text": f"{settings.data}, {len(prepared.texts.train):,} sequences",
        "held out": f"{len(prepared.texts.held_out)} sequences",
        "loss": "cross-entropy of the next token" if teacher is None else f"KL divergence from {teacher}",
        "peak learning rate": str(prepared.rate),
    }
    print_values(f"Plan: {job.model.name} to {job.out}", values)


def show_tuning(result: "Result") -> None:
    tuning = result.tuning
    held_out, other = tuning.held_out, tuning.other_text
    values = {
        "trained": f"{TRAINED[tuning.trained]}, {tuning.trained_parameters:,} parameters",
        "steps": f"{tuning.steps:,} of {tuning.planned_steps:,}, the best after {tuning.best_step:,}",
        "perplexity, held out": change(held_out.before, held_out.after, held_out.dense),
        **({} if other is None else {f"perplexity, {other.source}": change(other.before, other.after)}),
        "bytes": gigabytes(result.bytes),
        "seconds": f"{result.seconds:.1f}",
        "reloads": reloads(result.difference),
    }
    print_values(f"Tuned: {result.out}", values)
    print_lines(result.notes)


def change(before: float, after: float, dense: float | None = None) -> str:
    """Perplexities before and after, and the share of the lost that has come back, where the dense model was asked."""
    said = f"{math.exp(before):.2f} to {math.exp(after):.2f}"
    if dense is None or before <= dense:
        return said
    return f"{said}, dense {math.exp(dense):.2f}: {(before - after) / (before - dense):.0%} of the loss is won back"
