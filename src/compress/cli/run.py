"""`compress run`: any recipe, from a file or from the checkpoint that it made."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from compress.cli.compressing import (
    CacheMemory,
    DryRun,
    Export,
    MaxMemory,
    Out,
    Overwrite,
    PushToHub,
    Resume,
    ShowRecipe,
    bytes_of,
    default_output,
    deliver,
)
from compress.cli.options import (
    BatchSize,
    Calibration,
    DataDir,
    Device,
    Dtype,
    Json,
    Profile,
    SeqLen,
    look_at,
    printable,
    usual_seq_len,
)
from compress.cli.reporting import quiet_libraries, reporting_errors
from compress.errors import Faults, UsageError

if TYPE_CHECKING:
    from compress.models.hub import ModelSource
    from compress.recipe_file import RecipeFile

RECIPE = "A YAML recipe such as those in configs/, or a compress.json or the folder that has one."
MODEL = "A hub id, an alias, a folder or demo. Default: the recipe's own, of a compress.json; else demo."


@reporting_errors
def run_recipe(
    recipe: Annotated[Path, typer.Argument(help=RECIPE, show_default=False)],
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    calib: Calibration = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Calibration windows. Default: the recipe's.")] = None,
    seq_len: SeqLen = None,
    data_dir: DataDir = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Default: the recipe's.")] = None,
    out: Out = None,
    dtype: Dtype = None,
    export: Export = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    push_to_hub: PushToHub = None,
    dry_run: DryRun = False,
    show_recipe: ShowRecipe = False,
    json: Json = False,
    device: Device = None,
    batch_size: BatchSize = None,
    max_memory: MaxMemory = None,
    cache_memory: CacheMemory = None,
    profile: Profile = False,
) -> None:
    """Run a recipe: any stages that make sense together, in one walk.

    Example: compress run configs/slice-then-4bit.yaml --model llama-2-7b
    """
    faults = Faults()
    given = {"calib": calib, "samples": samples, "seq_len": seq_len, "seed": seed, "dtype": dtype}

    from compress.job import Job
    from compress.recipe import parse_recipe
    from compress.recipe_file import read_recipe

    with faults.noted():
        cache_bytes, most_bytes = bytes_of(cache_memory, "--cache-memory"), bytes_of(max_memory, "--max-memory")
    with faults.noted():
        file = read_recipe(recipe)
    named = "demo"
    if not faults.found:
        with faults.noted():
            named = named_model(model, file)
    source, data_folder, machine = look_at(faults, model=named, dtype=dtype, data_dir=data_dir, device=device)

    quiet_libraries()
    parsed = parse_recipe(completed(file, source, given), file.place)
    written, windows = export or kept_export(file), batch_size or kept_batch_size(file)
    job = Job(
        model=source,
        recipe=parsed,
        out=out or default_output(source, parsed.method, "recipe"),
        command=command_of(file, source, given, {"export": written, "batch_size": windows}),
        export=written,
        device=machine,
        batch_size=windows,
        cache_memory=cache_bytes,
        max_memory=most_bytes,
        data_dir=data_folder,
        resume=resume,
        overwrite=overwrite,
    )
    deliver(
        job,
        dry_run=dry_run,
        show_recipe=show_recipe,
        push_to_hub=push_to_hub,
        as_json=json,
        like=file.facts,
        profile=profile,
    )


def named_model(asked: str | None, file: "RecipeFile") -> str:
    if asked is not None:
        return asked
    if file.facts is None:
        return "demo"
    base = file.facts.get("base_model")
    if not isinstance(base, str):
        raise UsageError(f"{file.file} does not say which model it was made from. Name it with --model.")
    return base


def kept_export(file: "RecipeFile") -> Literal["hf", "gguf"]:
    return "gguf" if (file.facts or {}).get("export") == "gguf" else "hf"


def kept_batch_size(file: "RecipeFile") -> int | None:
    """Windows at a time that the checkpoint was made with, because they have a say in its last bits."""
    found = (file.facts or {}).get("batch_size")
    if found is None or (type(found) is int and found > 0):
        return found
    raise UsageError(f"{file.file} has the batch_size {found!r}, which is no number of windows. Say --batch-size.")


def completed(file: "RecipeFile", source: "ModelSource", given: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's data with what was typed in place of its own, and with what both leave to us."""
    from compress.models.loading import load_config

    data = {"method": file.file.stem, **file.data}
    calibration = data.get("calibration", {})
    if isinstance(calibration, dict):
        longest = usual_seq_len(load_config(source.config_folder()), None)
        usual = {"source": "stdlib" if source.is_demo else "wikitext2", "seq_len": longest}
        typed = {"source": given["calib"], "samples": given["samples"], "seq_len": given["seq_len"]}
        data["calibration"] = {**usual, **calibration, **without_none(typed)}
    return data | without_none({"seed": given["seed"], "dtype": given["dtype"]})


def command_of(file: "RecipeFile", source: "ModelSource", given: Mapping[str, Any], kept: Mapping[str, Any]) -> str:
    """What a user would type for it again: of a checkpoint's recipe as it was, the command that made the checkpoint."""
    if file.facts is not None and not without_none(given):
        command = file.facts.get("command")
        if isinstance(command, str):
            return command
    options = {"model": source.repository or source.name, **given, **kept}
    return printable(f"compress run {file.file.name}", options)


def without_none(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
