"""`compress run`: any recipe, from a file or from the checkpoint that it made."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from compress.cli.compressing import RunOptions
from compress.cli.options import Output, in_panel, with_options
from compress.cli.recipes import Draft
from compress.cli.reporting import reporting_errors
from compress.errors import Problems, UsageError

if TYPE_CHECKING:
    from compress.recipe_file import RecipeFile

RECIPE = "A YAML recipe, the name of a shipped one, a compress.json, or the folder of a checkpoint."
EXPORT = (
    "gguf: also write a GGUF file for llama.cpp (Llama-like architectures). Default: the checkpoint's own, else hf."
)
MODEL = "A hub id, an alias, a folder or demo. Default: the base model of a compress.json; else demo."


@reporting_errors
@with_options(RunOptions, without=("measure_error",))
def run_recipe(
    run: RunOptions,
    recipe: Annotated[Path, typer.Argument(help=RECIPE, show_default=False)],
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    export: Annotated[Literal["hf", "gguf"] | None, in_panel(Output, EXPORT)] = None,
) -> None:
    """Run a recipe: any stages that make sense together, in one walk.

    Example: compress run slice-then-slim --model llama-2-7b
    """
    from compress.recipe_file import read_recipe

    file = read_recipe(recipe)
    facts = file.facts or {}
    run.compress(
        Draft({"method": file.file.stem, **file.data}, file.place),
        Problems(),
        verb=f"run {file.file.name}",
        amount=lambda _: "recipe",
        export=export or ("gguf" if facts.get("export") == "gguf" else "hf"),
        model=model or base_model(file),
        batch_size=run.batch_size or kept_batch_size(file),
        like=file.facts,
    )


def base_model(file: "RecipeFile") -> str:
    """The model that a checkpoint was made from; demo for a recipe alone."""
    if file.facts is None:
        return "demo"
    base = file.facts.get("base_model")
    if not isinstance(base, str):
        raise UsageError(f"{file.file} does not say which model it was made from. Name it with --model.")
    return base


def kept_batch_size(file: "RecipeFile") -> int | None:
    """Sequences per batch that the checkpoint was made with, because they have a say in its last bits."""
    found = (file.facts or {}).get("batch_size")
    if found is None or (type(found) is int and found > 0):
        return found
    raise UsageError(f"{file.file} has the batch_size {found!r}, which is not a number of sequences. Say --batch-size.")
