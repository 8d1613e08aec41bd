"""`compress finetune`: what a compressed checkpoint has lost, won back by a little training."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from compress.cli.finetune_tables import show_plan, show_tuning
from compress.cli.options import (
    Data,
    DataDir,
    Device,
    Json,
    Machine,
    Method,
    Output,
    Profile,
    Seed,
    in_panel,
    look_at,
    printable,
    usual_seq_len,
)
from compress.cli.profiling import profiled
from compress.cli.progress import progress_bar
from compress.cli.reporting import quiet_libraries, reporting_errors
from compress.errors import Faults, UsageError

if TYPE_CHECKING:
    from compress.checkpoints.metadata import Metadata
    from compress.models.hub import ModelSource
    from compress.tuning.settings import TuningJob
    from compress.tuning.tuner import Result

Length = "How long"
USUAL_STEPS = 400
USUAL_LENGTH = 1024  # tokens a window


@reporting_errors
def finetune(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="The compressed checkpoint's folder.")],
    data: Annotated[
        str | None,
        in_panel(Data, "alpaca, wikitext2, stdlib, c4, ptb, or a .txt or .jsonl file. Default: the calibration text."),
    ] = None,
    seq_len: Annotated[
        int | None, in_panel(Data, "Tokens a window. Default: 1024, or what the model has.", min=2)
    ] = None,
    data_dir: DataDir = None,
    seed: Seed = 42,
    steps: Annotated[int | None, in_panel(Length, f"Steps. Default: {USUAL_STEPS}.", min=1)] = None,
    tokens: Annotated[int | None, in_panel(Length, "Or so many tokens.", min=1)] = None,
    epochs: Annotated[float | None, in_panel(Length, "Or the whole text so many times.", min=0.001)] = None,
    eval_every: Annotated[
        int, in_panel(Length, "Steps between looks at held-out windows; an interrupted run goes on from there.", min=1)
    ] = 50,
    patience: Annotated[int, in_panel(Length, "End after so many looks without a better one.", min=1)] = 5,
    train: Annotated[
        Literal["lora", "factors", "adapters", "all"] | None,
        in_panel(Method, "What is trained. Default: the adapters or the factors where there are any, else a LoRA."),
    ] = None,
    distill: Annotated[
        Literal["none", "logits"],
        in_panel(
            Method,
            "Towards the text's next tokens alone, or the dense model's distribution over them.",
        ),
    ] = "logits",
    teacher: Annotated[
        str | None, in_panel(Method, "The dense model to distill from. Default: the one that compress.json names.")
    ] = None,
    lora_rank: Annotated[int, in_panel(Method, "Of a new LoRA.", min=1)] = 32,
    lora_alpha: Annotated[
        int | None, in_panel(Method, "Its product is multiplied by alpha / rank. Default: the rank.", min=1)
    ] = None,
    lr: Annotated[
        float | None,
        in_panel(Method, "The highest learning rate, for all that is trained. Default: by what that is and its size."),
    ] = None,
    warmup: Annotated[float, in_panel(Method, "Share of the steps in which it gets there.", min=0, max=1)] = 0.05,
    merge: Annotated[
        bool | None,
        typer.Option(
            "--merge/--no-merge",
            help="Put a LoRA into the weights, or keep it beside them. Default: in, where they stay what they are.",
            rich_help_panel=Method,
        ),
    ] = None,
    out: Annotated[Path | None, in_panel(Output, "Output folder. Default: ./compressed/NAME-tuned.")] = None,
    resume: Annotated[
        bool, in_panel(Output, "Go on with an interrupted run, if there is one.", flag="--resume")
    ] = False,
    overwrite: Annotated[bool, in_panel(Output, "Replace the output if it exists.", flag="--overwrite")] = False,
    dry_run: Annotated[bool, in_panel(Output, "Show what would be trained, and end.", flag="--dry-run")] = False,
    json: Json = False,
    batch_size: Annotated[int, in_panel(Machine, "Windows a step, of all processes together.", min=1)] = 16,
    gradient_checkpointing: Annotated[
        bool,
        in_panel(Machine, "Compute activations twice rather than keep them.", flag="--gradient-checkpointing"),
    ] = False,
    dtype: Annotated[
        str | None,
        in_panel(
            Machine,
            "Of what is frozen, in memory. Default, and least, on the CPU: float32; on a GPU the checkpoint's own.",
        ),
    ] = None,
    device: Device = None,
    profile: Profile = False,
) -> None:
    """Train a compressed checkpoint a little, to win back what it has lost. It keeps its form, its shapes and its size.

    Example: compress finetune compressed/llama-2-7b-anchored-kp0.75 --data alpaca
    """
    faults = Faults()
    given: dict[str, Any] = {"steps": steps, "tokens": tokens, "epochs": epochs}
    with faults.noted():
        check_length({name: value for name, value in given.items() if value is not None})
    with faults.noted():
        if lr is not None and not 0 < lr < 1:
            raise UsageError(f"--lr must be between 0 and 1, got {lr:g}.")
    with faults.noted():
        if teacher is not None and distill == "none":
            raise UsageError("--teacher is what --distill distills from. Leave it out, or say --distill logits.")
    source, data_folder, machine = look_at(faults, model=str(folder), dtype=dtype, data_dir=data_dir, device=device)

    import torch

    from compress.checkpoints.run_folder import own_metadata
    from compress.models.loading import load_config
    from compress.tuning.settings import Settings, TuningJob

    quiet_libraries()
    metadata = own_metadata(folder, "tuned")
    if all(value is None for value in given.values()):
        given["steps"] = USUAL_STEPS
    settings = Settings(
        data=data or metadata.recipe.calibration.source,
        **given,
        seq_len=usual_seq_len(load_config(folder).get_text_config(), seq_len, USUAL_LENGTH),
        batch_size=batch_size,
        train=train,
        rank=lora_rank,
        alpha=lora_rank if lora_alpha is None else lora_alpha,
        learning_rate=lr,
        warmup=warmup,
        distill=distill,
        merge=merge,
        eval_every=eval_every,
        patience=patience,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
    )
    job = TuningJob(
        model=source,
        settings=settings,
        teacher=None if distill == "none" else find_teacher(teacher, metadata),
        out=out or Path("compressed") / f"{source.name}-tuned",
        command=command_of(source.name, settings, teacher, dtype),
        dtype=None if dtype is None else getattr(torch, dtype),
        device=machine,
        data_dir=data_folder,
        resume=resume,
        overwrite=overwrite,
    )
    if dry_run:
        from compress.tuning.looking import look

        show_plan(look(job), as_json=json)
        return
    with profiled(profile):
        result = run_with_progress(job)
    if result is not None:
        show_tuning(result, as_json=json)


def check_length(given: dict[str, Any]) -> None:
    if len(given) > 1:
        raise UsageError(f"{' and '.join(f'--{name}' for name in given)} all say how long. Use one of them.")


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


def command_of(name: str, settings: Any, teacher: str | None, dtype: str | None) -> str:
    """What a user would type for it again, with every default spelled out."""
    from compress.tuning.settings import OPTIONS

    told: dict[str, Any] = dict(vars(settings))
    merge = told.pop("merge")
    told = {OPTIONS.get(key, key): value for key, value in told.items()}
    options: dict[str, Any] = {
        **told,
        "merge": merge,
        "no_merge": merge is False,
        "teacher": teacher,
        "dtype": dtype,
    }
    return printable(f"compress finetune {name}", options)


def run_with_progress(job: "TuningJob") -> "Result | None":
    from compress.tuning.tuner import tune

    try:
        with progress_bar("preparing") as progress:
            return tune(job, progress)
    except KeyboardInterrupt as interrupt:
        if job.partial.exists():
            raise KeyboardInterrupt("what was trained is kept; the same command with --resume goes on") from interrupt
        raise
