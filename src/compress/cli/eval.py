"""`compress eval`: how good a model is, dense or compressed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli import options as opt
from compress.cli.console import progress_bar, quiet_libraries, reporting_errors
from compress.cli.tables import gigabytes, number, print_json, print_lines, print_rows
from compress.datasets import load_rows
from compress.errors import Problems, report
from compress.models.hub import ModelSource
from compress.numerics import DTYPES

if TYPE_CHECKING:
    from compress.evaluation.evaluate import Evaluation, Request
    from compress.evaluation.generation import Sampling

Measures, Programs = opt.Panel("What to measure"), opt.Panel("HumanEval")
PAPERS_TEMPERATURE = 0.8

PPL = "Perplexity on data sets or text files, with commas between: wikitext2, c4, ptb, stdlib, FILE.txt"
KL = "KL divergence from this dense model, on the texts of --ppl."
TASKS = "Tasks of lm-eval, with commas between: piqa,winogrande,arc_easy,arc_challenge,mmlu,..."
HUMANEVAL = "Run HumanEval, which executes generated code, and report pass@k."
MODEL = "A hub id, an alias, a folder, a GGUF file or demo. Default: newest under ./compressed, else demo."
COMPARE = "Several models in one table: --compare A B C."
LIMIT = "Only the first sequences, documents, problems, for a quick look."
ALLOW = "Run the programs that the model writes on this machine."
TEMPERATURE = "Sampling temperature. Default: 0, greedy; 0.8 for several samples."
ENGINE = "What runs the models: transformers, or llamacpp for GGUF files (with --ppl)."
DTYPE = "Dtype to compute in. Default: float32 on the CPU, the model's own on a GPU."

NOTHING = "Nothing to measure. Try --ppl wikitext2, --kl DENSE, --tasks piqa,winogrande or --humaneval, or several."
NOT_ALLOWED = (
    "--humaneval runs programs that a model wrote, on this machine and as your user. Limits on their time and memory "
    "are no sandbox (docs/security.md): use a container, and say --allow-code-execution."
)
NOT_FOR_LLAMACPP = "--engine llamacpp measures --ppl alone. Leave --kl, --tasks, --humaneval, --dtype and --device out."
OF_PROGRAMS = "--allow-code-execution, --samples-per-problem, --temperature and --k are of --humaneval. Add it."


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """As they were typed."""

    ppl: Annotated[str | None, Measures(PPL)] = None
    kl: Annotated[str | None, Measures(KL)] = None
    tasks: Annotated[str | None, Measures(TASKS)] = None
    humaneval: Annotated[bool, Measures(HUMANEVAL, "--humaneval")] = False
    model: Annotated[str | None, typer.Option(help=MODEL)] = None
    compare: Annotated[list[str] | None, typer.Option(help=COMPARE, metavar="MODEL")] = None
    seq_len: Annotated[int | None, opt.Data("Tokens per sequence. Default: 2048, or what the model has.", min=2)] = None
    limit: Annotated[int | None, opt.Data(LIMIT, min=1)] = None
    data_dir: opt.DataDir = None
    allow_code_execution: Annotated[bool, Programs(ALLOW, "--allow-code-execution")] = False
    samples_per_problem: Annotated[int, Programs("Samples (programs) per problem.", min=1)] = 1
    temperature: Annotated[float | None, Programs(TEMPERATURE, min=0)] = None
    k: Annotated[str, Programs("The k of pass@k, with commas between: 1,10.")] = "1"
    seed: Annotated[int, opt.Data("Random seed of the programs.", min=0)] = 0
    batch_size: opt.BatchSize = 8
    engine: Annotated[opt.Engine, opt.Machine(ENGINE)] = "transformers"
    dtype: Annotated[str | None, opt.Machine(DTYPE)] = None
    device: opt.Device = None
    trust_remote_code: opt.TrustRemoteCode = False
    save: opt.Save = False
    json: opt.Json = False

    def check(self, others: Sequence[str]) -> None:
        """Raises UsageError with all that does not go together."""
        ks, samples = opt.names_in(self.k) or [], self.samples_per_problem
        of_programs = self.allow_code_execution or samples > 1 or self.temperature is not None or ks != ["1"]
        stray, same = of_programs and not self.humaneval, samples > 1 and self.temperature == 0
        fit = all(each.isascii() and each.isdigit() and 0 < int(each) <= samples for each in ks)
        not_ppl = self.kl or self.tasks or self.humaneval or self.dtype or self.device
        most = f"from 1 to --samples-per-problem ({samples}), with commas between; got {self.k!r}."
        other = others[0] if others else ""
        rules = {
            "--ppl names no data set. Try --ppl wikitext2.": opt.names_in(self.ppl) == [],
            "--tasks names no task. Try --tasks piqa,winogrande.": opt.names_in(self.tasks) == [],
            NOTHING: self.ppl is self.kl is self.tasks is None and not self.humaneval,
            NOT_ALLOWED: self.humaneval and not self.allow_code_execution,
            OF_PROGRAMS: stray,
            "--temperature 0 writes the same program every time. Use --samples-per-problem 1.": same and not stray,
            f"--k takes numbers {most}": not (stray or same or (ks and fit)),
            f"{other!r} is no option. Name a model with --model, or several with --compare.": others
            and not self.compare,
            "--model and --compare both name models. Use one of them.": self.model and self.compare,
            NOT_FOR_LLAMACPP: self.engine == "llamacpp" and not_ppl,
        }
        report([rule for rule, is_broken in rules.items() if is_broken])

    @property
    def runs_programs(self) -> bool:
        return self.humaneval and self.allow_code_execution

    def sampling(self) -> "Sampling":
        """At the paper's temperature for several samples, which would all be the same one otherwise."""
        from compress.evaluation.generation import Sampling

        usual = PAPERS_TEMPERATURE if self.samples_per_problem > 1 else 0.0
        temperature = usual if self.temperature is None else self.temperature
        ks = tuple(sorted(map(int, opt.names_in(self.k) or ())))
        return Sampling(self.samples_per_problem, temperature, ks, self.seed)


@reporting_errors
@opt.with_options(EvalOptions)
def evaluate(
    options: EvalOptions,
    others: Annotated[list[str] | None, typer.Argument(help="More models to --compare.", metavar="MODELS")] = None,
) -> None:
    """Measure a model: perplexity by the papers' convention, divergence from the dense model, tasks, HumanEval.

    Example: compress eval --ppl wikitext2 --model opt-125m
    """
    problems = Problems()
    problems.check(options.check, others or [])
    named = [*options.compare, *(others or [])] if options.compare else []
    named = named or [options.model or str(opt.newest_output() or "demo")]
    places = [*named, *([options.kl] if options.kl else [])]
    found = opt.look_at(problems, places, dtype=options.dtype, data_dir=options.data_dir, device=options.device)
    if options.dtype in DTYPES and found.device is not None:
        import torch

        from compress.numerics.sums import check_computing

        problems.check(check_computing, getattr(torch, options.dtype), found.device)
    for source in found.models[: len(named)] if options.save else []:
        problems.check(opt.kept_in, source)
    evaluations, notes = measure_all(found, gather(problems, options, found), options)
    if not options.compare:
        show_quality(evaluations[0], as_json=options.json)
    elif options.json:
        print_json({"models": [{**each.to_dict(), "bytes": each.bytes} for each in evaluations], "notes": notes})
    else:
        print_rows("Compared with the same settings", [compared(each) for each in evaluations])
        print_lines(notes)


def gather(problems: Problems, options: EvalOptions, found: opt.Found) -> "Request":
    """What is to be measured, with its documents and problems. All problems so far are told here."""
    texts, tasks = opt.names_in(options.ppl) or [], opt.names_in(options.tasks) or []
    if not tasks and not options.runs_programs:
        problems.report()
    quiet_libraries()
    from compress.datasets.texts import load_problems
    from compress.evaluation.evaluate import Request
    from compress.evaluation.generation import check_can_run
    from compress.evaluation.tasks import load_tasks

    request = Request(
        texts=texts,
        compared_on=(texts or [usual_text(found.models)]) if options.kl else [],
        seq_len=options.seq_len,
        limit=options.limit,
        batch_size=options.batch_size or 8,
        data_dir=found.data_dir,
        trust_remote_code=options.trust_remote_code,
    )
    with problems.collect():
        request = replace(request, tasks=load_tasks(tasks, found.data_dir))
    with problems.collect():
        if options.runs_programs:
            check_can_run()
            request = replace(request, problems=load_problems(found.data_dir, options.limit))
    for text in texts if problems.found else []:
        problems.check(load_rows, text, "test", found.data_dir)
    problems.report()
    return replace(request, sampling=options.sampling()) if options.runs_programs else request


def usual_text(sources: Sequence[ModelSource]) -> str:
    """As for calibration: wikitext2, and stdlib for demo."""
    return "stdlib" if any(source.is_demo for source in sources) else "wikitext2"


def measure_all(found: opt.Found, request: "Request", options: EvalOptions) -> "tuple[list[Evaluation], list[str]]":
    """One model in memory at a time, the dense one of --kl first; it was named last. And notes on what was measured."""
    from compress.checkpoints.quality import save_quality
    from compress.evaluation import evaluate as evaluation
    from compress.evaluation.llamacpp import gguf_file
    from compress.models import stored_loading
    from compress.models.soundness import free_memory

    problems, subjects = Problems(), list[evaluation.Subject]()
    for source in found.models:
        with problems.collect():
            subjects.append(evaluation.prepare(source.name, source.whole_folder(), request))
            if options.engine == "llamacpp":
                gguf_file(subjects[-1].folder, source.name)
    problems.report()
    dense = subjects.pop() if options.kl else None
    if dense is not None:
        evaluation.check_same_tokens(dense, subjects)
    evaluations = []
    with progress_bar("preparing") as progress:

        def load(subject: evaluation.Subject) -> Any:
            progress(f"loading {subject.name}", "", 0, 0)
            free_memory()
            dtype = opt.computing_dtype(options.dtype, subject.config, found.device)
            how: dict[str, Any] = {"device": found.device, "trust_remote_code": options.trust_remote_code}
            return stored_loading.open_model(subject.folder, dtype=dtype, **how)

        references = {} if dense is None else evaluation.remember_dense(dense, load(dense), request, progress)
        for subject in subjects:
            if options.engine == "llamacpp":
                evaluations.append(evaluation.measure_in_llamacpp(subject, request, progress))
            else:
                evaluations.append(evaluation.measure(subject, load(subject), request, references, progress))
    for source, measured in zip(found.models, evaluations, strict=False) if options.save else ():  # without --kl's
        save_quality(opt.kept_in(source), measured.quality)
    return evaluations, evaluation.cut_otherwise(subjects)


# What was measured: of one model a row a measure, of several a row a model.


def show_quality(found: "Evaluation", *, as_json: bool) -> None:
    if as_json:
        print_json(found.to_dict())
        return
    quality = found.quality
    rows = [{"": each.name, "value": each.text_and_sample} for each in quality.measures]
    print_rows(f"{found.model}: {found.parameters:,} parameters", rows)
    failures = quality.humaneval.failures if quality.humaneval else {}
    print_lines(f"{kind}: {count}" for kind, count in sorted(failures.items(), key=lambda each: -each[1]))


def compared(found: "Evaluation") -> dict[str, str | None]:
    quality = found.quality
    means = quality.tasks.average if quality.tasks else {}
    rates = quality.humaneval.rates if quality.humaneval else {}
    return {
        **{"model": found.model, "bytes": gigabytes(found.bytes), "params": f"{found.parameters:,}"},
        **by_text("ppl", {each.dataset: f"{each.ppl:.3f}" for each in quality.perplexity}),
        **by_text("KL", {each.dataset: f"{each.kl:.4f}" for each in quality.divergence}),
        **{f"mean {name}": number(value, ".2%") for name, value in means.items()},
        **{name: f"{each.value:.2%}" for name, each in rates.items()},
    }


def by_text(measure: str, cells: dict[str, str]) -> dict[str, str]:
    """Under the text's name; a file's is short where that is enough."""
    short = {PurePath(text).name: cell for text, cell in cells.items()}
    return {f"{measure} {name}": cell for name, cell in (short if len(short) == len(cells) else cells).items()}
