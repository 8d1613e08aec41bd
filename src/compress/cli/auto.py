"""`compress auto`: name a size, get the best model of that size."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from compress.cli.compressing import MODEL, RunOptions, keeping_what_is_done
from compress.cli.options import Amounts, Method, Output, in_panel, parse_size, with_options
from compress.cli.progress import progress_bar
from compress.cli.recipes import Draft
from compress.cli.reporting import reporting_errors, seeing_interrupts
from compress.cli.tables import gigabytes, print_json, print_rows
from compress.errors import Problems, UsageError
from compress.launch import launch

if TYPE_CHECKING:
    from compress.planning.frontier import Frontier
    from compress.planning.prepare import Job

SIZE = "Bytes of the file at most: 88.2MB, 4GB. Never exceeded."
FOR = "What runs the result; llama.cpp is the only one yet."
TRIALS = "Sets of types to measure, each a forward pass over a few windows. Default: 20."
TIME = "Seconds of trials at most; what has been found by then is taken."
BETWEEN = "Find the types at twelve sizes, such as 40MB:120MB, and write a table and a picture in place of a model."
FROM = "Take what a --frontier has found, which needs no survey and no trials."
INSTEAD = {
    "vllm": "Use compress quantize --bits, whose files vLLM reads.",
    "transformers": "Use compress slice --target-size, or compress quantize --bits.",
}


@dataclass(frozen=True, kw_only=True)
class AutoOptions(RunOptions):
    frontier: Annotated[str | None, in_panel(Amounts, BETWEEN, metavar="LEAST:MOST")] = None
    from_: Annotated[Path | None, in_panel(Method, FROM, flag="--from")] = None

    @property
    def sizes(self) -> tuple[int, int]:
        """Raises UsageError unless --frontier says two."""
        words = (self.frontier or "").split(":")
        sizes = [parse_size(word, "--frontier") for word in words] if len(words) == 2 else [0, 0]
        if not 0 < sizes[0] < sizes[1]:
            raise UsageError(f"--frontier {self.frontier}: name two sizes, the smaller one first: 40MB:120MB.")
        return sizes[0], sizes[1]

    def deliver(self, job: "Job", like: Any) -> None:
        job = replace(job, frontier=self.from_)
        if self.frontier is None or self.show_recipe or self.dry_run:
            super().deliver(job, like)
            return
        if launch().count > 1:
            raise UsageError("--frontier runs in one process. Start it without torchrun.")
        from compress.checkpoints.run_folder import RUN
        from compress.pipeline import map_frontier

        kept = keeping_what_is_done("what was found is kept", (job.partial / RUN).exists)
        with kept, seeing_interrupts(), progress_bar("preparing") as progress:
            found = map_frontier(job, self.sizes, progress)
        show_frontier(job, found, as_json=self.json)


@reporting_errors
@with_options(AutoOptions)
def auto_model(
    run: AutoOptions,
    model: Annotated[str | None, typer.Option(help=f"{MODEL} Default: that of --from, else demo.")] = None,
    target_size: Annotated[str | None, in_panel(Amounts, SIZE)] = None,
    for_: Annotated[Literal["llama.cpp", "vllm", "transformers"], in_panel(Output, FOR, flag="--for")] = "llama.cpp",
    trials: Annotated[int | None, in_panel(Method, TRIALS, min=0)] = None,
    time: Annotated[float | None, in_panel(Method, TIME)] = None,
) -> None:
    """Find the best types of a GGUF file for a size: each matrix gets its own, by what the loss feels.

    Example: compress auto --model llama-2-7b --target-size 3.5GB
    """
    problems, data = Problems(), None
    with problems.collect():
        if for_ in INSTEAD:
            raise UsageError(f"--for {for_} is not there yet. {INSTEAD[for_]}")
        if (target_size is None) == (run.frontier is None):
            raise UsageError("Say how large by --target-size 88MB, or by --frontier 40MB:120MB; one of the two.")
        if run.frontier is not None and run.from_ is not None:
            raise UsageError("--from takes one size of a frontier. Say which by --target-size.")
    with problems.collect():
        data = None if run.from_ is None else recipe_of(run.from_)
    draft = Draft.preset("auto") if data is None else Draft(data["recipe"])
    if not problems.found:
        with problems.collect():
            middle = None if target_size else round(math.sqrt(math.prod(run.sizes)))  # where a frontier's trials are
            size = parse_size(target_size, "--target-size") if target_size else middle
            draft.set("budget.target_size", size, f"--target-size {target_size}")
            draft.set("budget.trials", trials, f"--trials {trials}")
            draft.set("budget.trial_seconds", time, f"--time {time}")
    amount = target_size or "frontier"
    base = "demo" if data is None else data["base_model"]
    run.compress(draft, problems, verb="auto", amount=lambda _: amount, model=model or base)


def recipe_of(folder: Path) -> dict[str, Any]:
    from compress.planning.frontier import read_frontier

    return read_frontier(folder).model_dump()


def show_frontier(job: "Job", found: "Frontier", *, as_json: bool) -> None:
    if as_json:
        points = [point.to_dict() for point in found.points]
        print_json({"out": str(job.out), "points": points, "factors": found.factors})
        return
    rows = [
        {
            "bytes": f"{point.bytes:,}",
            "size": gigabytes(point.bytes),
            "predicted, nats": f"{point.predicted:.4f}",
            "measured, nats": None if point.measured is None else f"{point.measured:.4f}",
            "mostly": mostly(point.types),
        }
        for point in found.points
    ]
    print_rows(f"{job.model.name}: {job.out}", rows)


def mostly(types: dict[str, str]) -> str:
    """The three types that most matrices have."""
    counts = sorted(((list(types.values()).count(name), name) for name in {*types.values()}), reverse=True)
    return ", ".join(f"{name} x {count}" for count, name in counts[:3])
