"""`compress eval`: how good a model is, dense or compressed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.options import (
    BatchSize,
    Data,
    DataDir,
    Device,
    Found,
    Json,
    Machine,
    Output,
    TrustRemoteCode,
    computing_dtype,
    in_panel,
    look_at,
    newest_output,
    with_options,
)
from compress.cli.progress import progress_bar
from compress.cli.quality_tables import show_comparison, show_quality
from compress.cli.reporting import quiet_libraries, reporting_errors
from compress.errors import Problems, UsageError
from compress.numerics import DTYPES

if TYPE_CHECKING:
    import torch

    from compress.evaluation.evaluate import Evaluation
    from compress.evaluation.subject import Request, Subject
    from compress.models.hub import ModelSource

Measures = "What to measure"
Programs = "HumanEval"
PAPERS_TEMPERATURE = 0.8

PPL = "Perplexity on data sets or text files, with commas between: wikitext2, c4, ptb, stdlib, FILE.txt"
KL = "KL divergence from this dense model, on the texts of --ppl."
TASKS = "Tasks of lm-eval, with commas between: piqa,winogrande,arc_easy,arc_challenge,mmlu,..."
HUMANEVAL = "Run HumanEval, which executes generated code, and report pass@k."
MODEL = "A hub id, an alias, a folder, a GGUF file or demo. Default: newest under ./compressed, else demo."
ALLOW = "Run the programs that the model writes on this machine."
TEMPERATURE = "Sampling temperature. Default: 0, greedy; 0.8 for several samples."


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """As they were typed."""

    ppl: Annotated[str | None, in_panel(Measures, PPL)] = None
    kl: Annotated[str | None, in_panel(Measures, KL)] = None
    tasks: Annotated[str | None, in_panel(Measures, TASKS)] = None
    humaneval: Annotated[bool, in_panel(Measures, HUMANEVAL, flag="--humaneval")] = False
    model: Annotated[str | None, typer.Option(help=MODEL)] = None
    compare: Annotated[
        list[str] | None, typer.Option(help="Several models in one table: --compare A B C.", metavar="MODEL")
    ] = None
    seq_len: Annotated[
        int | None, in_panel(Data, "Tokens per sequence. Default: 2048, or what the model has.", min=2)
    ] = None
    limit: Annotated[
        int | None, in_panel(Data, "Only the first sequences, documents, problems, for a quick look.", min=1)
    ] = None
    data_dir: DataDir = None
    allow_code_execution: Annotated[bool, in_panel(Programs, ALLOW, flag="--allow-code-execution")] = False
    samples_per_problem: Annotated[int, in_panel(Programs, "Samples (programs) per problem.", min=1)] = 1
    temperature: Annotated[float | None, in_panel(Programs, TEMPERATURE, min=0)] = None
    k: Annotated[str, in_panel(Programs, "The k of pass@k, with commas between: 1,10.")] = "1"
    seed: Annotated[int, in_panel(Data, "Random seed of the programs.", min=0)] = 0
    batch_size: BatchSize = 8
    dtype: Annotated[
        str | None, in_panel(Machine, "Dtype to compute in. Default: float32 on the CPU, the model's own on a GPU.")
    ] = None
    device: Device = None
    trust_remote_code: TrustRemoteCode = False
    save: Annotated[
        bool, in_panel(Output, "Keep the result in quality.json in the checkpoint's folder.", flag="--save")
    ] = False
    json: Json = False

    def check(self, problems: Problems, others: list[str] | None) -> tuple[int, ...]:
        """Note what does not go together. The ks of pass@k."""
        for text, what in ((self.ppl, "--ppl names no data set. Try --ppl wikitext2."), (self.tasks, NO_TASK)):
            with problems.collect():
                if text is not None and not words(text):
                    raise UsageError(what)
        ks: tuple[int, ...] = (1,)
        with problems.collect():
            if self.ppl is self.kl is self.tasks is None and not self.humaneval:
                raise UsageError(NOTHING)
        with problems.collect():
            if self.humaneval and not self.allow_code_execution:
                raise UsageError(NOT_ALLOWED)
        with problems.collect():
            ks = self.pass_ks()
        with problems.collect():
            if others and not self.compare:
                raise UsageError(f"{others[0]!r} is no option. Name a model with --model, or several with --compare.")
            if self.model and self.compare:
                raise UsageError("--model and --compare both name models. Use one of them.")
        return ks

    def pass_ks(self) -> tuple[int, ...]:
        ks, samples = words(self.k), self.samples_per_problem
        if not self.humaneval:
            if self.allow_code_execution or samples > 1 or self.temperature is not None or ks != ["1"]:
                raise UsageError(
                    "--allow-code-execution, --samples-per-problem, --temperature and --k are of --humaneval. Add it."
                )
            return (1,)
        if samples > 1 and self.temperature == 0:
            raise UsageError("--temperature 0 writes the same program every time. Use --samples-per-problem 1.")
        if not ks or not all(each.isascii() and each.isdigit() and 0 < int(each) <= samples for each in ks):
            raise UsageError(
                f"--k takes numbers from 1 to --samples-per-problem ({samples}), with commas between; got {self.k!r}."
            )
        return tuple(sorted({int(each) for each in ks}))


NO_TASK = "--tasks names no task. Try --tasks piqa,winogrande."
NOTHING = "Nothing to measure. Try --ppl wikitext2, --kl DENSE, --tasks piqa,winogrande or --humaneval, or several."
NOT_ALLOWED = (
    "--humaneval runs programs that a model wrote, on this machine and as your user. Limits on their time and memory "
    "are no sandbox (docs/security.md): use a container, and say --allow-code-execution."
)


@reporting_errors
@with_options(EvalOptions)
def evaluate(
    options: EvalOptions,
    others: Annotated[list[str] | None, typer.Argument(help="More models to --compare.", metavar="MODELS")] = None,
) -> None:
    """Measure a model: perplexity by the papers' convention, divergence from the dense model, tasks, HumanEval.

    Example: compress eval --ppl wikitext2 --model opt-125m
    """
    problems = Problems()
    ks = options.check(problems, others)
    compared = [*options.compare, *(others or [])] if options.compare else None
    named = compared or [options.model or str(newest_output() or "demo")]
    found = look_at(
        problems,
        [*named, *([options.kl] if options.kl else [])],
        dtype=options.dtype,
        data_dir=options.data_dir,
        device=options.device,
    )
    with problems.collect():
        check_computing_dtype(options.dtype, found)
    if options.save:
        check_places_to_save(problems, found.models[: len(named)])
    request = gather(problems, options, found, ks)
    subjects, dense = prepare_all(found.models, request, with_dense=options.kl is not None)
    evaluations = measure_all(subjects, dense, request, options.dtype, found.device)
    if options.save:
        save_all(subjects, evaluations)
    if compared:
        show_comparison(evaluations, notes_on(subjects), as_json=options.json)
    else:
        show_quality(evaluations[0], as_json=options.json)


def words(text: str | None) -> list[str]:
    """What stands between the commas, once each."""
    return list(dict.fromkeys(word.strip() for word in (text or "").split(",") if word.strip()))


def check_computing_dtype(dtype: str | None, found: Found) -> None:
    if dtype in DTYPES and found.device is not None:
        import torch

        from compress.numerics.precision import check_computing

        check_computing(getattr(torch, dtype), found.device)


def check_places_to_save(problems: Problems, sources: "Sequence[ModelSource]") -> None:
    for source in sources:
        with problems.collect():
            if source.folder is None or source.is_demo:
                raise UsageError(f"--save keeps quality.json in a checkpoint's folder; {source.name} is none of yours.")


def gather(problems: Problems, options: EvalOptions, found: Found, ks: tuple[int, ...]) -> "Request":
    """What is to be measured, with its documents and problems. All problems so far are told here."""
    texts, tasks = words(options.ppl), words(options.tasks)
    runs_programs = options.humaneval and options.allow_code_execution
    if not tasks and not runs_programs:
        problems.report()
    quiet_libraries()
    from compress.datasets import load_rows
    from compress.datasets.humaneval import load_problems
    from compress.evaluation.humaneval import Sampling, check_can_run
    from compress.evaluation.subject import Request, load_tasks

    request = Request(
        texts=tuple(texts),
        compared_on=(tuple(texts) or (usual_text(found.models),)) if options.kl else (),
        sampling=Sampling(options.samples_per_problem, drawn_at(options), ks, options.seed),
        seq_len=options.seq_len,
        limit=options.limit,
        batch_size=options.batch_size or 8,
        data_dir=found.data_dir,
        trust_remote_code=options.trust_remote_code,
    )
    with problems.collect():
        request = replace(request, tasks=load_tasks(tasks, found.data_dir))
    with problems.collect():
        if runs_programs:
            check_can_run()
            request = replace(request, problems=load_problems(found.data_dir, options.limit))
    for text in texts if problems.found else []:
        with problems.collect():
            load_rows(text, "test", found.data_dir)
    problems.report()
    return request


def drawn_at(options: EvalOptions) -> float:
    if options.temperature is not None:
        return options.temperature
    return PAPERS_TEMPERATURE if options.samples_per_problem > 1 else 0.0


def usual_text(sources: "Sequence[ModelSource]") -> str:
    """As for calibration: wikitext2, and stdlib for demo."""
    return "stdlib" if any(source.is_demo for source in sources) else "wikitext2"


def prepare_all(
    sources: "Sequence[ModelSource]", request: "Request", *, with_dense: bool
) -> "tuple[list[Subject], Subject | None]":
    """The models to be measured, and the dense one, which was named last. All problems of all of them at once."""
    from compress.evaluation.subject import check_same_tokens, prepare

    problems, prepared = Problems(), []
    for source in sources:
        with problems.collect():
            prepared.append(prepare(source.name, source.whole_folder(), request))
    problems.report()
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
