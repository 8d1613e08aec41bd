"""`compress finetune`: what a compressed checkpoint has lost, won back by a little training."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from compress.cli.compressing import keeping_what_is_done
from compress.cli.options import (
    Data,
    Machine,
    Method,
    Output,
    WritingOptions,
    in_panel,
    look_at,
    usual_seq_len,
    with_options,
)
from compress.cli.profiling import profiled
from compress.cli.progress import progress_bar
from compress.cli.reporting import quiet_libraries, reporting_errors
from compress.cli.tables import gigabytes, print_json, print_lines, print_values, reloads
from compress.errors import Problems, UsageError

if TYPE_CHECKING:
    from compress.checkpoints.metadata import Metadata
    from compress.models.hub import ModelSource
    from compress.tuning.looking import Prepared
    from compress.tuning.settings import TuningJob
    from compress.tuning.tuner import Result

Length = "How long"
STEPS = 400
SEQ_LEN = 1024
TRAINED = {"lora": "a LoRA", "factors": "the factors", "adapters": "the adapters", "all": "all weights"}


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(WritingOptions):
    """Those with the name of a setting are its value."""

    data: Annotated[
        str | None,
        in_panel(Data, "alpaca, wikitext2, stdlib, c4, ptb, or a .txt or .jsonl file. Default: the calibration text."),
    ] = None
    seq_len: Annotated[
        int | None, in_panel(Data, f"Tokens per sequence. Default: {SEQ_LEN}, or what the model has.", min=2)
    ] = None
    steps: Annotated[int | None, in_panel(Length, f"Training length in steps. Default: {STEPS}.", min=1)] = None
    tokens: Annotated[int | None, in_panel(Length, "Training length in tokens.", min=1)] = None
    epochs: Annotated[float | None, in_panel(Length, "Training length in epochs.", min=0.001)] = None
    eval_every: Annotated[
        int, in_panel(Length, "Steps between evaluations on held-out sequences, where --resume goes on from.", min=1)
    ] = 50
    patience: Annotated[int, in_panel(Length, "Early stopping: evaluations without a better one.", min=1)] = 5
    train: Annotated[
        Literal["lora", "factors", "adapters", "all"] | None,
        in_panel(
            Method, "Trainable parameters. Default: the adapters or the factors where there are any, else a LoRA."
        ),
    ] = None
    distill: Annotated[
        Literal["none", "logits"],
        in_panel(Method, "logits: KL divergence from the dense model. none: cross-entropy of the text's next tokens."),
    ] = "logits"
    teacher: Annotated[
        str | None, in_panel(Method, "The dense model to distill from. Default: the one that compress.json names.")
    ] = None
    lora_rank: Annotated[int, in_panel(Method, "Rank of a new LoRA.", min=1)] = 32
    lora_alpha: Annotated[
        int | None, in_panel(Method, "The LoRA is scaled by alpha / rank. Default: the rank.", min=1)
    ] = None
    lr: Annotated[float | None, in_panel(Method, "Peak learning rate. Default: by what is trained and its size.")] = (
        None
    )
    warmup: Annotated[float, in_panel(Method, "Share of the steps in which the learning rate rises.", min=0, max=1)] = (
        0.05
    )
    merge: Annotated[
        bool | None,
        in_panel(
            Method,
            "Merge a LoRA into the weights, or keep it as an adapter. Default: merge, where weights keep their form.",
            flag="--merge/--no-merge",
        ),
    ] = None
    out: Annotated[Path | None, in_panel(Output, "Output folder. Default: ./compressed/NAME-tuned.")] = None
    batch_size: Annotated[int, in_panel(Machine, "Sequences per step, over all processes.", min=1)] = 16
    gradient_checkpointing: Annotated[
        bool,
        in_panel(
            Machine, "Recompute activations in the backward pass to save memory.", flag="--gradient-checkpointing"
        ),
    ] = False
    dtype: Annotated[
        str | None,
        in_panel(
            Machine, "Dtype of frozen weights in memory. Default, and least, on the CPU: float32; on a GPU their own."
        ),
    ] = None

    def check(self, problems: Problems) -> None:
        lengths = [name for name in ("steps", "tokens", "epochs") if getattr(self, name) is not None]
        with problems.collect():
            if len(lengths) > 1:
                raise UsageError(f"{' and '.join(f'--{name}' for name in lengths)} all say how long. Use one of them.")
        with problems.collect():
            if self.lr is not None and not 0 < self.lr < 1:
                raise UsageError(f"--lr must be between 0 and 1, got {self.lr:g}.")
        with problems.collect():
            if self.teacher is not None and self.distill == "none":
                raise UsageError("--teacher has no effect with --distill none. Leave one out.")

    def settings(self, usual_data: str, config: Any) -> Any:
        from compress.tuning.settings import Settings

        given = {each.name: getattr(self, each.name) for each in fields(Settings)}
        if self.steps is self.tokens is self.epochs is None:
            given["steps"] = STEPS
        given |= {"data": self.data or usual_data, "seed": 42 if self.seed is None else self.seed}
        return Settings(**given | {"seq_len": usual_seq_len(config, self.seq_len, SEQ_LEN)})


@reporting_errors
@with_options(FinetuneOptions)
def finetune(
    run: FinetuneOptions,
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="The compressed checkpoint's folder.")],
) -> None:
    """Finetune a compressed checkpoint to recover what it has lost. It keeps its form, its shapes and its size.

    Example: compress finetune compressed/llama-2-7b-anchored-kp0.75 --data alpaca
    """
    problems = Problems()
    run.check(problems)
    found = look_at(problems, [str(folder)], dtype=run.dtype, data_dir=run.data_dir, device=run.device)
    problems.report()

    import torch

    from compress.checkpoints.run_folder import own_metadata
    from compress.models.loading import load_config
    from compress.tuning.looking import look
    from compress.tuning.settings import TuningJob

    quiet_libraries()
    metadata, (source,) = own_metadata(folder, "tuned"), found.models
    job = TuningJob(
        model=source,
        settings=run.settings(metadata.recipe.calibration.source, load_config(folder).get_text_config()),
        teacher=None if run.distill == "none" else find_teacher(run.teacher, metadata),
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
    with profiled(run.profile):
        result = run_with_progress(job)
    if result is not None:
        show_tuning(result, as_json=run.json)


def find_teacher(asked: str | None, metadata: "Metadata") -> "ModelSource":
    """The dense model. Raises UsageError where the one that was compressed cannot be found by its name alone."""
    from compress.models.hub import find_model

    if asked is not None:
        return find_model(asked)
    try:
        return find_model(metadata.base_model)
    except UsageError as error:
        raise UsageError(
            f"The dense model is not found by its name in compress.json, {metadata.base_model!r}. "
            "Name its folder with --teacher, or train on the text alone with --distill none."
        ) from error


def run_with_progress(job: "TuningJob") -> "Result | None":
    from compress.tuning.tuner import tune

    with keeping_what_is_done("what was trained is kept", job.partial.exists), progress_bar("preparing") as progress:
        return tune(job, progress)


def show_plan(prepared: "Prepared", *, as_json: bool) -> None:
    settings, job = prepared.job.settings, prepared.job
    teacher = None if job.teacher is None else job.teacher.name
    if as_json:
        print_json(
            {
                "out": str(job.out),
                "trained": prepared.what,
                "trained_parameters": prepared.num_trained,
                "merge": prepared.merge,
                "steps": prepared.steps,
                "windows": len(prepared.texts.train),
                "seq_len": settings.seq_len,
                "batch_size": settings.batch_size,
                "learning_rate": prepared.rate.highest,
                "relative_rate": prepared.rate.relative,
                "teacher": teacher,
            }
        )
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


def show_tuning(result: "Result", *, as_json: bool) -> None:
    if as_json:
        print_json(result.to_dict())
        return
    tuning = result.tuning.to_dict()
    other = tuning["other_text"]
    values = {
        "trained": f"{TRAINED[tuning['trained']]}, {tuning['trained_parameters']:,} parameters",
        "steps": f"{tuning['steps']:,} of {tuning['planned_steps']:,}, the best after {tuning['best_step']:,}",
        "perplexity, held out": change(tuning["held_out"]),
        **({} if other is None else {f"perplexity, {other['source']}": change(other)}),
        "bytes": gigabytes(result.bytes),
        "seconds": f"{result.seconds:.1f}",
        "reloads": reloads(result.difference),
    }
    print_values(f"Tuned: {result.out}", values)
    print_lines(result.notes)


def change(found: dict[str, Any]) -> str:
    """Perplexities before and after, and the share of the lost that has come back, where the dense model was asked."""
    said = f"{math.exp(found['before']):.2f} to {math.exp(found['after']):.2f}"
    dense = found.get("dense")
    if dense is None or found["before"] <= dense:
        return said
    share = (found["before"] - found["after"]) / (found["before"] - dense)
    return f"{said}, dense {math.exp(dense):.2f}: {share:.0%} of the loss is won back"
