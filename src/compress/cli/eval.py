"""`compress eval`: how good a model is, dense or compressed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.options import (
    BatchSize,
    Data,
    DataDir,
    Device,
    Json,
    Machine,
    Output,
    Seed,
    check_dtype,
    in_panel,
    pick_device,
)
from compress.cli.outputs import computing_dtype, newest_output
from compress.cli.progress import progress_bar
from compress.cli.quality_tables import show_comparison, show_quality
from compress.cli.reporting import quiet_libraries, reporting_errors
from compress.errors import Faults, UsageError
from compress.numerics import DTYPES

if TYPE_CHECKING:
    import torch

    from compress.evaluation.evaluate import Evaluation
    from compress.evaluation.subject import Request, Subject
    from compress.models.hub import ModelSource

Measures = "What to measure"
Programs = "HumanEval"
PAPERS_TEMPERATURE = 0.8


@reporting_errors
def evaluate(
    others: Annotated[list[str] | None, typer.Argument(help="More models to --compare.", metavar="MODELS")] = None,
    ppl: Annotated[
        str | None,
        in_panel(
            Measures, "Perplexity on data sets or text files, with commas between: wikitext2, c4, ptb, stdlib, FILE.txt"
        ),
    ] = None,
    kl: Annotated[
        str | None,
        in_panel(Measures, "The dense model to measure the divergence from, on the texts of --ppl."),
    ] = None,
    tasks: Annotated[
        str | None,
        in_panel(Measures, "Tasks of lm-eval, with commas between: piqa,winogrande,arc_easy,arc_challenge,mmlu,..."),
    ] = None,
    humaneval: Annotated[
        bool,
        in_panel(Measures, "Run HumanEval, which executes generated code, and report pass@k.", flag="--humaneval"),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="A hub id, an alias, a folder, a GGUF file or demo. Default: newest under ./compressed, else demo."
        ),
    ] = None,
    compare: Annotated[
        list[str] | None, typer.Option(help="Several models in one table: --compare A B C.", metavar="MODEL")
    ] = None,
    seq_len: Annotated[
        int | None, in_panel(Data, "Tokens a window. Default: 2048, or what the model has.", min=2)
    ] = None,
    limit: Annotated[
        int | None, in_panel(Data, "Only the first windows, documents, problems, for a quick look.", min=1)
    ] = None,
    data_dir: DataDir = None,
    allow_code_execution: Annotated[
        bool,
        in_panel(Programs, "Run the programs that the model writes on this machine.", flag="--allow-code-execution"),
    ] = False,
    samples_per_problem: Annotated[int, in_panel(Programs, "Programs that are written for each.", min=1)] = 1,
    temperature: Annotated[
        float | None, in_panel(Programs, "To draw tokens at. Default: 0, greedy; 0.8 for several samples.", min=0)
    ] = None,
    k: Annotated[str, in_panel(Programs, "Of pass@k, with commas between: 1,10.")] = "1",
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    dtype: Annotated[
        str | None, in_panel(Machine, "To compute in. Default: float32 on the CPU, the model's own on a GPU.")
    ] = None,
    device: Device = None,
    trust_remote_code: Annotated[
        bool, in_panel(Machine, "Run modeling code that the checkpoint brings along.", flag="--trust-remote-code")
    ] = False,
    save: Annotated[
        bool, in_panel(Output, "Keep the result beside the checkpoint, in quality.json.", flag="--save")
    ] = False,
    json: Json = False,
) -> None:
    """Measure a model: perplexity by the papers' convention, divergence from the dense model, tasks, HumanEval.

    Example: compress eval --ppl wikitext2 --model opt-125m
    """
    faults = Faults()
    with faults.noted():
        check_measures(ppl, kl, tasks, humaneval=humaneval)
    ks: tuple[int, ...] = (1,)
    with faults.noted():
        ks = check_programs(k, samples_per_problem, temperature, humaneval=humaneval, allowed=allow_code_execution)
    with faults.noted():
        check_models(model, compare, others)
    named = [*(compare or []), *(others or [])] if compare else [model or str(newest_output() or "demo")]
    found = look_at_models(faults, [*named, *([kl] if kl else [])], dtype=dtype, data_dir=data_dir, device=device)
    if save:
        with faults.noted():
            check_places_to_save(found.places[: len(named)])
    programs = humaneval and allow_code_execution
    request = gather(faults, words(ppl), words(tasks), found.data_dir, humaneval=programs, limit=limit)

    from compress.evaluation.humaneval import Sampling

    request = replace(
        request,
        compared_on=(request.texts or (usual_text(found.places),)) if kl else (),
        sampling=Sampling(samples_per_problem, drawn_at(temperature, samples_per_problem), ks, seed),
        seq_len=seq_len,
        batch_size=batch_size or 8,
        trust_remote_code=trust_remote_code,
    )
    subjects, dense = prepare_all(found.places, request, with_dense=kl is not None)
    assert found.device is not None
    evaluations = measure_all(subjects, dense, request, dtype, found.device)
    if save:
        save_all(subjects, evaluations)
    if compare:
        show_comparison(evaluations, notes_on(subjects), as_json=json)
    else:
        show_quality(evaluations[0], as_json=json)


# What was asked.


def words(text: str | None) -> list[str]:
    """What stands between the commas, once each."""
    return list(dict.fromkeys(word.strip() for word in (text or "").split(",") if word.strip()))


def check_measures(ppl: str | None, kl: str | None, tasks: str | None, *, humaneval: bool) -> None:
    if ppl is None and kl is None and tasks is None and not humaneval:
        raise UsageError(
            "Nothing to measure. Try --ppl wikitext2, --kl DENSE, --tasks piqa,winogrande or --humaneval, or several."
        )
    faults = Faults()
    with faults.noted():
        if ppl is not None and not words(ppl):
            raise UsageError("--ppl names no data set. Try --ppl wikitext2.")
    with faults.noted():
        if tasks is not None and not words(tasks):
            raise UsageError("--tasks names no task. Try --tasks piqa,winogrande.")
    faults.report()


def check_programs(
    k: str, samples: int, temperature: float | None, *, humaneval: bool, allowed: bool
) -> tuple[int, ...]:
    """The ks of pass@k."""
    faults = Faults()
    with faults.noted():
        if humaneval and not allowed:
            raise UsageError(
                "--humaneval runs programs that a model wrote, on this machine and as your user. Limits on their time "
                "and memory are no sandbox (docs/security.md): use a container, and say --allow-code-execution."
            )
    with faults.noted():
        if not humaneval and (allowed or samples > 1 or temperature is not None or words(k) != ["1"]):
            raise UsageError(
                "--allow-code-execution, --samples-per-problem, --temperature and --k are of --humaneval. Add it."
            )
    with faults.noted():
        if samples > 1 and temperature == 0:
            raise UsageError("--temperature 0 writes the same program every time. Use --samples-per-problem 1.")
    ks = words(k)
    with faults.noted():
        possible = ks and all(each.isascii() and each.isdigit() and 0 < int(each) <= samples for each in ks)
        if humaneval and not possible:
            raise UsageError(
                f"--k takes numbers from 1 to --samples-per-problem ({samples}), with commas between; got {k!r}."
            )
    faults.report()
    return tuple(sorted({int(each) for each in ks}))


def drawn_at(temperature: float | None, samples: int) -> float:
    return temperature if temperature is not None else PAPERS_TEMPERATURE if samples > 1 else 0.0


def check_models(model: str | None, compare: list[str] | None, others: list[str] | None) -> None:
    if others and not compare:
        raise UsageError(f"{others[0]!r} is no option. Name a model with --model, or several with --compare.")
    if model and compare:
        raise UsageError("--model and --compare both name models. Use one of them.")


# Where it is.


@dataclass(frozen=True)
class Place:
    """A model that was named: of the hub or a folder, or a GGUF file."""

    name: str
    source: "ModelSource | None"
    gguf: Path | None

    def folder(self) -> Path:
        """Fetched, if it has to be."""
        if self.gguf is not None:
            return self.gguf.parent
        assert self.source is not None
        return self.source.whole_folder()


@dataclass(frozen=True)
class Found:
    """device: None where it cannot be used."""

    places: list[Place]
    data_dir: Path | None
    device: "torch.device | None"


def look_at_models(
    faults: Faults, names: Sequence[str], *, dtype: str | None, data_dir: Path | None, device: str | None
) -> Found:
    """Models, data folder and device; what is wrong is noted. Without torch as far as possible."""
    from compress.datasets import data_directory

    places: list[Place] = []
    data_folder, target = None, None
    for name in names:
        with faults.noted():
            places.append(find_place(name))
    with faults.noted():
        check_dtype(dtype)
    with faults.noted():
        data_folder = data_directory(data_dir)
    if device is not None or not faults.found:
        with faults.noted():
            target = pick_device(device)
            check_computing_dtype(dtype, target)
    return Found(places, data_folder, target)


def check_computing_dtype(dtype: str | None, device: "torch.device") -> None:
    import torch

    from compress.numerics.precision import check_computing

    if dtype in DTYPES:
        check_computing(getattr(torch, dtype), device)


def gather(
    faults: Faults, texts: list[str], tasks: list[str], data_dir: Path | None, *, humaneval: bool, limit: int | None
) -> "Request":
    """What is to be measured, with its documents and problems. All faults so far are told here."""
    if not tasks and not humaneval:
        faults.report()
    quiet_libraries()
    from compress.datasets import load_rows
    from compress.datasets.humaneval import load_problems
    from compress.evaluation.humaneval import check_can_run
    from compress.evaluation.subject import Request, load_tasks

    request = Request(texts=tuple(texts), data_dir=data_dir, limit=limit)
    with faults.noted():
        request = replace(request, tasks=load_tasks(tasks, data_dir))
    with faults.noted():
        if humaneval:
            check_can_run()
            request = replace(request, problems=load_problems(data_dir, limit))
    for text in texts if faults.found else []:
        with faults.noted():
            load_rows(text, "test", data_dir)
    faults.report()
    return request


def find_place(name: str) -> Place:
    from compress.models.hub import find_gguf, find_model

    if (gguf := find_gguf(name)) is not None:
        return Place(Path(name).expanduser().resolve().name, None, gguf)
    source = find_model(name)
    return Place(source.name, source, None)


def usual_text(places: Sequence[Place]) -> str:
    """As for calibration: wikitext2, and stdlib for demo."""
    return "stdlib" if any(place.source and place.source.is_demo for place in places) else "wikitext2"


def check_places_to_save(places: Sequence[Place]) -> None:
    faults = Faults()
    for place in places:
        with faults.noted():
            if place.source is None or place.source.folder is None or place.source.is_demo:
                raise UsageError(f"--save keeps quality.json in a checkpoint's folder; {place.name} is none of yours.")
    faults.report()


# Measuring.


def prepare_all(
    places: Sequence[Place], request: "Request", *, with_dense: bool
) -> "tuple[list[Subject], Subject | None]":
    """The models to be measured, and the dense one, which was named last. All faults of all of them at once."""
    from compress.evaluation.subject import check_same_tokens, prepare

    faults, prepared = Faults(), []
    for place in places:
        with faults.noted():
            prepared.append(prepare(place.name, place.folder(), place.gguf, request))
    faults.report()
    subjects, dense = (prepared[:-1], prepared[-1]) if with_dense else (prepared, None)
    if dense is not None:
        check_same_tokens(dense, subjects)
    return subjects, dense


def measure_all(
    subjects: "Sequence[Subject]",
    dense: "Subject | None",
    request: "Request",
    dtype: str | None,
    device: "torch.device",
) -> "list[Evaluation]":
    from compress.evaluation.evaluate import free_memory, measure, remember_dense

    evaluations = []
    with progress_bar("preparing") as progress:

        def load(subject: "Subject") -> Any:
            progress(f"loading {subject.name}", "", 0, 0)
            computing = computing_dtype(dtype, subject.config, device)
            return subject.load(computing, device, trust_remote_code=request.trust_remote_code)

        references = remember_dense(dense, load(dense), request, progress) if dense is not None else {}
        for subject in subjects:
            free_memory()
            evaluations.append(measure(subject, load(subject), request, references, progress))
    return evaluations


def save_all(subjects: "Sequence[Subject]", evaluations: "Sequence[Evaluation]") -> None:
    from compress.checkpoints.quality import save_quality

    for subject, found in zip(subjects, evaluations, strict=True):
        save_quality(subject.folder, found.quality)


def notes_on(subjects: "Sequence[Subject]") -> list[str]:
    from compress.evaluation.subject import cut_otherwise

    names = cut_otherwise(subjects)
    if not names:
        return []
    return [
        f"Of other windows than {subjects[0].name}'s, so not to be compared with it: perplexity of {', '.join(names)}."
    ]
