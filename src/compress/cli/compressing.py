"""The options of every command that compresses a model, said once, and the run that they ask for; `compress run`."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from compress.cli import console
from compress.cli import options as opt
from compress.cli.recipes import Draft, apply_settings
from compress.cli.tables import print_lines, show_plan, show_result
from compress.errors import Problems, UsageError
from compress.models.hub import ModelSource
from compress.process import launch

if TYPE_CHECKING:
    from compress.pipeline.output import Result
    from compress.planning.prepare import Job
    from compress.recipe import Recipe

MODEL = "A hub id, an alias such as llama-2-7b or opt-125m, a folder, a GGUF file, or demo."
CALIB = (
    "Calibration text: wikitext2, c4, ptb, alpaca, stdlib, or a .txt or .jsonl file. Default: wikitext2 (demo: stdlib)."
)
LENGTH = "Tokens per sequence. Default: 2048, or what the model has."
ERROR = "Report how far the stream is from the dense model's at each point; takes a second pass of every block."
RECIPE = "Print the recipe that `compress run` takes to do the same, and end."
PUSH = "Push the result to this private repository of the hub, OWNER/NAME."
MOST = "Memory that the run may take at most: 8GB. Batches and activation caches are chosen under it."
CACHE = "Memory for cached activations, 8GB; more goes to disk. Default: half of what is free."
SET = "Change a field of the recipe that has no option: STAGE.FIELD=VALUE, several times; --show-recipe shows them."
TARGET = (
    "Linear layers to compress: all, attention, mlp, or name patterns such as *.down_proj, with commas. Default: all."
)
TYPE = (
    "Write one GGUF file in llama.cpp's types instead: Q4_K_M, IQ4_XS, Q3_K_S and the like. Other types for some "
    "tensors: Q4_K_M,ffn_down=Q6_K."
)
DEPTH = "Number of blocks to leave out, those that the model misses least; chosen under a budget, 0 for none."
EXPORT = "gguf: also write a GGUF file for llama.cpp (Llama-like architectures)."


@dataclass(frozen=True, kw_only=True)
class RunOptions(opt.WritingOptions):
    """The shared options as they were typed."""

    model: Annotated[str, typer.Option(help=MODEL)] = "demo"
    calib: Annotated[str | None, opt.Data(CALIB, sets="calibration.source")] = None
    samples: Annotated[int | None, opt.Data("Calibration sequences. Default: 128.", sets="calibration.samples")] = None
    seq_len: Annotated[int | None, opt.Data(LENGTH, sets="calibration.seq_len")] = None
    set_: Annotated[list[str] | None, opt.Method(SET, "--set", metavar="STAGE.FIELD=VALUE")] = None
    push_to_hub: Annotated[str | None, opt.Output(PUSH)] = None
    measure_error: Annotated[bool, opt.Output(ERROR, "--measure-error")] = False
    show_recipe: Annotated[bool, opt.Output(RECIPE, "--show-recipe")] = False
    batch_size: opt.BatchSize = None
    max_memory: Annotated[str | None, opt.Machine(MOST)] = None
    cache_memory: Annotated[str | None, opt.Machine(CACHE)] = None

    def compress(
        self,
        draft: Draft,
        problems: Problems,
        *,
        verb: str,
        amount: "Callable[[Recipe], str]",
        export: Literal["hf", "gguf"] = "hf",
        model: str | None = None,
        batch_size: int | None = None,
        like: Mapping[str, Any] | None = None,
    ) -> None:
        """Check all that was typed, then run the recipe, or show what it would do.

        problems: those so far. amount: of the default output's name. model, batch_size: where none was typed. like: the
        compress.json of the checkpoint that is to be made again.
        """
        with problems.collect():
            if not problems.found:
                self.change(draft)
        check = None if problems.found else lambda: draft.recipe(**usual_calibration())
        sizes: dict[str, Any] = {
            name: None if text is None else problems.check(opt.parse_size, text, opt.flag_of(name))
            for name, text in (("cache_memory", self.cache_memory), ("max_memory", self.max_memory))
        }
        found = opt.look_at(problems, [model or self.model], data_dir=self.data_dir, device=self.device, check=check)
        problems.report()

        from compress.models.loading import load_config
        from compress.planning.prepare import Job

        console.quiet_libraries()
        (source,) = found.models
        recipe = draft.recipe(**usual_calibration(source, load_config(source.config_folder())))
        command = self.command(verb, model=source.repository or source.name)
        if like is not None and not {"calib", "samples", "seq_len", "seed", "dtype", "set_"} & self.typed.keys():
            command = str(like.get("command", command))
        job = Job(
            model=source,
            recipe=recipe,
            out=self.out or Path("compressed") / f"{source.name.replace('/', '--')}-{recipe.method}-{amount(recipe)}",
            command=command,
            export=export,
            device=found.device,
            batch_size=self.batch_size or batch_size,
            data_dir=found.data_dir,
            resume=self.resume,
            overwrite=self.overwrite,
            **sizes,
        )
        self.deliver(job, like)

    def change(self, draft: Draft) -> None:
        """Put what was typed into the recipe, --set last."""
        for address, value, typed in self.in_recipe:
            draft.set(address, value, typed)
        if self.measure_error:
            is_folded = draft.stages[:1] == [{"stage": "fold_norms"}]
            draft.stages.insert(int(is_folded), {"stage": "measure_error"})
        apply_settings(draft, self.set_ or [])

    def deliver(self, job: "Job", like: Mapping[str, Any] | None) -> None:
        """Do what was asked for with a job. like: see `compress`."""
        from compress.checkpoints.push import check_repository, push
        from compress.pipeline import plan_only
        from compress.recipe import as_yaml, comparison, read_recipe

        if self.push_to_hub is not None:
            check_repository(self.push_to_hub)
        if self.show_recipe or self.dry_run:
            if launch().is_first and self.show_recipe:
                sys.stdout.write(as_yaml(job.recipe))  # for other programs: no colors, no wrapping
            elif launch().is_first:
                show_plan(job, plan_only(job), as_json=self.json)
            return
        with console.profiled(self.profile):
            result = run_with_progress(job)
        if result is None:
            return
        if self.profile:
            console.show_seconds(result.seconds)
        if like is not None:
            made = read_recipe(result.out).facts
            assert made is not None
            result = replace(result, notes=[*result.notes, comparison(like, made)])
        show_result(job, result, as_json=self.json)
        if self.push_to_hub is not None:
            address = push(result.out, self.push_to_hub)
            print_lines([] if self.json else [f"pushed to {address}"])


def usual_calibration(source: ModelSource | None = None, config: object = None) -> dict[str, Any]:
    """What neither the recipe nor the user says: the demo's own text, sequences as long as the model takes."""
    text = "stdlib" if source is not None and source.is_demo else "wikitext2"
    return {"source": text, "seq_len": opt.usual_seq_len(config, None)}


def amount_of(recipe: "Recipe") -> str:
    """Bits, sparsity and adapters, as the default output folder says them."""
    slim: Any = next(stage for stage in recipe.stages if stage.stage == "slim")
    words = []
    if slim.quantize is not None:
        name = slim.quantize.gguf_type or f"w{slim.quantize.precision}"
        words.append(name.translate(str.maketrans(",=*", "--x")))
    if slim.prune is not None:
        words.append(slim.prune.pattern.replace(":", "-").replace("%", "pc"))
    if slim.adapt is not None:
        words.append(f"r{slim.adapt.rank:g}")
    return "-".join(words)


def run_with_progress(job: "Job") -> "Result | None":
    """The result; None in all but the first of several processes, which keep silent."""
    from compress.calibration.processes import joined
    from compress.checkpoints.run_folder import RUN
    from compress.pipeline import run_together

    with (
        keeping_what_is_done("what was finished is kept", (job.partial / RUN).exists),
        joined(job.device) as processes,
        console.seeing_interrupts(),
        console.progress_bar("preparing") as progress,
    ):
        return run_together(job, processes, progress)


@contextmanager
def keeping_what_is_done(said: str, is_kept: Callable[[], bool]) -> Iterator[None]:
    """An interruption that says how to go on, where something is kept."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if is_kept():
            raise KeyboardInterrupt(f"{said}; the same command with --resume goes on") from interrupt
        raise


# A recipe from a file.

FILE = "A YAML recipe, the name of a shipped one, a compress.json, or the folder of a checkpoint."
OWN_EXPORT = f"{EXPORT} Default: the checkpoint's own, else hf."
FILES_MODEL = "A hub id, an alias, a folder or demo. Default: the base model of a compress.json; else demo."


@console.reporting_errors
@opt.with_options(RunOptions, without=("measure_error",))
def run_recipe(
    run: RunOptions,
    recipe: Annotated[Path, typer.Argument(help=FILE, show_default=False)],
    model: Annotated[str | None, typer.Option(help=FILES_MODEL)] = None,
    export: Annotated[Literal["hf", "gguf"] | None, opt.Output(OWN_EXPORT)] = None,
) -> None:
    """Run a recipe: any stages that make sense together, in one walk.

    Example: compress run slice-then-slim --model llama-2-7b
    """
    from compress.recipe import read_recipe

    file = read_recipe(recipe)
    facts = file.facts or {}
    # The model that a checkpoint was made from; and its sequences per batch, because they have a say in its last bits.
    base, batch_size = "demo" if file.facts is None else facts.get("base_model"), facts.get("batch_size")
    if model is None and not isinstance(base, str):
        raise UsageError(f"{file.file} does not say which model it was made from. Name it with --model.")
    if run.batch_size is None and batch_size is not None and not (type(batch_size) is int and batch_size > 0):
        what = f"{file.file} has the batch_size {batch_size!r}, which is not a number of sequences"
        raise UsageError(f"{what}. Say --batch-size.")
    run.compress(
        Draft({"method": file.file.stem, **file.data}, file.place),
        Problems(),
        verb=f"run {file.file.name}",
        amount=lambda _: "recipe",
        export=export or ("gguf" if facts.get("export") == "gguf" else "hf"),
        model=model or base,
        batch_size=run.batch_size or batch_size,
        like=file.facts,
    )
