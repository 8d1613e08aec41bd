"""The options of every command that compresses a model, said once, and the run that they ask for."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from compress.cli.compressing import command_line, complete_recipe, default_output, deliver
from compress.cli.options import (
    BatchSize,
    Calibration,
    Data,
    DataDir,
    Device,
    Dtype,
    Json,
    Machine,
    Output,
    Profile,
    Samples,
    Seed,
    SeqLen,
    in_panel,
    look_at,
    parse_size,
)
from compress.cli.reporting import quiet_libraries
from compress.errors import Faults

if TYPE_CHECKING:
    import torch

    from compress.models.hub import ModelSource
    from compress.recipe import Recipe

MODEL = "A hub id, an alias such as llama-2-7b or opt-125m, a folder, or demo."
OUT = "Output folder. Default: ./compressed/MODEL-METHOD-AMOUNT."
RESUME = "Go on with an interrupted run, if there is one."
ERROR = "Run the dense model beside and report how far the stream is from its own at each point."
RECIPE = "Print the recipe that `compress run` takes to do the same, and end."
PUSH = "Push the result to this repository of the hub, OWNER/NAME, which only you then see."
MOST = "What the run may hold in memory, a promise: 8GB. Batches and activation caches are chosen under it."
CACHE = "Activations beyond this go to disk: 8GB. Default: half of what is free."

TrialSamples = Annotated[
    int | None, in_panel(Data, "Calibration windows of each trial under a budget. Default: a quarter.", min=8)
]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The shared options as they were typed."""

    model: Annotated[str, typer.Option(help=MODEL)] = "demo"
    calib: Calibration = None
    samples: Samples = 128
    seq_len: SeqLen = None
    data_dir: DataDir = None
    seed: Seed = 42
    out: Annotated[Path | None, in_panel(Output, OUT)] = None
    dtype: Dtype = None
    resume: Annotated[bool, in_panel(Output, RESUME, flag="--resume")] = False
    overwrite: Annotated[bool, in_panel(Output, "Replace the output if it exists.", flag="--overwrite")] = False
    push_to_hub: Annotated[str | None, in_panel(Output, PUSH)] = None
    measure_error: Annotated[bool, in_panel(Output, ERROR, flag="--measure-error")] = False
    dry_run: Annotated[bool, in_panel(Output, "Show sizes and needs from config.json alone.", flag="--dry-run")] = False
    show_recipe: Annotated[bool, in_panel(Output, RECIPE, flag="--show-recipe")] = False
    json: Json = False
    device: Device = None
    batch_size: BatchSize = None
    max_memory: Annotated[str | None, in_panel(Machine, MOST)] = None
    cache_memory: Annotated[str | None, in_panel(Machine, CACHE)] = None
    profile: Profile = False

    def check(self, faults: Faults, model: str | None = None) -> "Resources":
        """Find what the options name; what is wrong with them is raised with the faults so far.

        model: in place of what was typed.
        """
        with faults.noted():
            cache = None if self.cache_memory is None else parse_size(self.cache_memory, "--cache-memory")
            most = None if self.max_memory is None else parse_size(self.max_memory, "--max-memory")
        found = look_at(faults, model=model or self.model, dtype=self.dtype, data_dir=self.data_dir, device=self.device)
        quiet_libraries()
        return Resources(*found, cache, most)

    def recipe(self, source: "ModelSource", method: str, stages: list[dict[str, Any]], **rest: Any) -> "Recipe":
        """The recipe of these stages over the calibration text that was named."""
        return complete_recipe(
            source,
            method,
            stages,
            calib=self.calib,
            samples=self.samples,
            seq_len=self.seq_len,
            seed=self.seed,
            dtype=self.dtype,
            **rest,
        )

    def command(self, verb: str, method: str, source: "ModelSource", recipe: "Recipe", own: Mapping[str, Any]) -> str:
        """The command line that repeats the run. own: the options of the verb besides its method."""
        shared = {"measure_error": self.measure_error, "batch_size": self.batch_size}
        return command_line(verb, method, source, recipe, {**own, **shared})

    def deliver(
        self,
        resources: "Resources",
        recipe: "Recipe",
        *,
        amount: str,
        command: str,
        export: Literal["hf", "gguf"] = "hf",
        batch_size: int | None = None,
        like: Mapping[str, Any] | None = None,
    ) -> None:
        """Run the recipe, or show what it would do.

        amount: of the default output's name. batch_size: where none was typed. like: the compress.json of the
        checkpoint that is to be made again.
        """
        from compress.planning.prepare import Job

        job = Job(
            model=resources.source,
            recipe=recipe,
            out=self.out or default_output(resources.source, recipe.method, amount),
            command=command,
            export=export,
            device=resources.device,
            batch_size=self.batch_size or batch_size,
            cache_memory=resources.cache_memory,
            max_memory=resources.max_memory,
            data_dir=resources.data_folder,
            resume=self.resume,
            overwrite=self.overwrite,
        )
        deliver(
            job,
            dry_run=self.dry_run,
            show_recipe=self.show_recipe,
            push_to_hub=self.push_to_hub,
            as_json=self.json,
            profile=self.profile,
            like=like,
        )


@dataclass(frozen=True)
class Resources:
    """What the options name, found. cache_memory, max_memory: bytes."""

    source: "ModelSource"
    data_folder: Path | None
    device: "torch.device"
    cache_memory: int | None
    max_memory: int | None


def with_run_options(*, without: tuple[str, ...] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of `RunOptions` besides its own; its function gets them as the first argument.

    An option of its own takes the place of the shared one of that name. without: shared ones that it lacks.
    """

    def decorated(body: Callable[..., None]) -> Callable[..., None]:
        own = dict(list(inspect.signature(body).parameters.items())[1:])
        shared = {
            field.name: inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type
            )
            for field in fields(RunOptions)
            if field.name not in without
        }
        # The model first, then what is the command's own.
        first = {} if "model" in own else {"model": shared["model"]}
        parameters = {**first, **own, **{name: each for name, each in shared.items() if name not in own}}

        signature = inspect.Signature(
            [each.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for each in parameters.values()]
        )

        @functools.wraps(body)
        def command(*args: Any, **kwargs: Any) -> None:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            typed = bound.arguments
            run = RunOptions(**{name: typed[name] for name in shared})
            body(run, **{name: typed[name] for name in own})

        command.__signature__ = signature  # type: ignore[attr-defined]
        command.__annotations__ = {name: each.annotation for name, each in parameters.items()}
        return command

    return decorated
