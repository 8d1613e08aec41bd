"""`compress run`: any recipe, from a file or from the checkpoint that it made."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from compress.cli.options import Output, in_panel, printable, usual_seq_len
from compress.cli.reporting import reporting_errors
from compress.cli.run_options import RunOptions, with_run_options
from compress.errors import Faults, UsageError

if TYPE_CHECKING:
    from compress.models.hub import ModelSource
    from compress.recipe_file import RecipeFile

RECIPE = "A YAML recipe such as those in configs/, or a compress.json or the folder that has one."
EXPORT = "gguf adds a GGUF file for llama.cpp, where it has the architecture. Default: hf."
MODEL = "A hub id, an alias, a folder or demo. Default: the recipe's own, of a compress.json; else demo."


@reporting_errors
@with_run_options(without=("measure_error",))
def run_recipe(
    run: RunOptions,
    recipe: Annotated[Path, typer.Argument(help=RECIPE, show_default=False)],
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Calibration windows. Default: the recipe's.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Default: the recipe's.")] = None,
    export: Annotated[Literal["hf", "gguf"] | None, in_panel(Output, EXPORT)] = None,
) -> None:
    """Run a recipe: any stages that make sense together, in one walk.

    Example: compress run configs/slice-then-slim.yaml --model llama-2-7b
    """
    faults = Faults()
    given = {"calib": run.calib, "samples": samples, "seq_len": run.seq_len, "seed": seed, "dtype": run.dtype}

    from compress.recipe import parse_recipe
    from compress.recipe_file import read_recipe

    with faults.noted():
        file = read_recipe(recipe)
    named = "demo"
    if not faults.found:
        with faults.noted():
            named = named_model(model, file)
    resources = run.check(faults, named)
    source = resources.source
    parsed = parse_recipe(completed(file, source, given), file.place)
    written, windows = export or kept_export(file), run.batch_size or kept_batch_size(file)
    command = command_of(file, source, given, {"export": written, "batch_size": windows})
    run.deliver(
        resources, parsed, amount="recipe", command=command, export=written, batch_size=windows, like=file.facts
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
