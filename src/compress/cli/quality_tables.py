"""What was measured, as tables for people and JSON for machines: of one model, or of several in one table."""

from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

from compress.cli.reporting import gigabytes, print_json, print_lines, print_table

if TYPE_CHECKING:
    from compress.checkpoints.quality import Divergence, HumanEval, Metric, Perplexity, Tasks, TaskScore
    from compress.evaluation.evaluate import Evaluation

ACCURACIES = ("acc", "acc_norm")


def show_quality(found: "Evaluation", *, as_json: bool) -> None:
    """A table a measure."""
    if as_json:
        print_json(found.to_dict())
        return
    title, quality = f"{found.model}: {found.parameters:,} parameters", found.quality
    if quality.perplexity:
        columns = ["text", "perplexity", "± std. error", "tokens", "windows", "of tokens", "seconds"]
        print_table(title, columns, [perplexity_row(each) for each in quality.perplexity])
    if quality.divergence:
        dense = quality.divergence[0].dense
        columns = ["text", "KL in nats a token", "same top token", "tokens", "windows"]
        print_table(
            f"{found.model}: divergence from {dense}", columns, [divergence_row(each) for each in quality.divergence]
        )
    if quality.tasks:
        columns = ["task", "documents", *ACCURACIES, "source"]
        print_table(title, columns, [task_row(each) for each in quality.tasks.scores])
        print_lines(task_lines(quality.tasks))
    if quality.humaneval:
        show_programs(title, quality.humaneval)


def show_comparison(found: "Sequence[Evaluation]", notes: Sequence[str], *, as_json: bool) -> None:
    """A row a model."""
    if as_json:
        print_json({"models": [{**each.to_dict(), "bytes": each.bytes} for each in found], "notes": list(notes)})
        return
    cells = [comparison_cells(each) for each in found]
    print_table("Compared with the same settings", list(cells[0]), [list(each.values()) for each in cells])
    print_lines(notes)


def comparison_cells(found: "Evaluation") -> dict[str, str]:
    """By column."""
    quality = found.quality
    cells = {"model": found.model, "bytes": gigabytes(found.bytes), "params": f"{found.parameters:,}"}
    cells |= by_text("ppl", {each.dataset: f"{each.ppl:.3f}" for each in quality.perplexity})
    cells |= by_text("KL", {each.dataset: f"{each.kl:.4f}" for each in quality.divergence})
    if quality.tasks:
        cells |= {f"mean {name}": percent(value) for name, value in quality.tasks.average.items()}
    if quality.humaneval:
        cells |= {name: percent(each.value) for name, each in quality.humaneval.rates.items()}
    return cells


def by_text(measure: str, cells: dict[str, str]) -> dict[str, str]:
    """Under the text's name; a file's is short where that is enough."""
    short = [PurePath(text).name for text in cells]
    names = short if len(set(short)) == len(short) else list(cells)
    return {f"{measure} {name}": cell for name, cell in zip(names, cells.values(), strict=True)}


def perplexity_row(result: "Perplexity") -> list[str]:
    return [
        result.dataset,
        f"{result.ppl:.3f}",
        decimals(result.standard_error, 3),
        f"{result.tokens:,}",
        f"{result.windows:,}",
        str(result.seq_len),
        f"{result.seconds:.1f}",
    ]


def divergence_row(result: "Divergence") -> list[str]:
    return [
        result.dataset,
        f"{result.kl:.4f} ± {decimals(result.standard_error, 4)}",
        f"{result.agreement:.2%}",
        f"{result.tokens:,}",
        f"{result.windows:,}",
    ]


def task_row(score: "TaskScore") -> list[str]:
    metrics = [score.metrics.get(name) for name in ACCURACIES]
    cells = [with_error(each) if each else "" for each in metrics]
    return [score.task, f"{score.documents:,}", *cells, score.source]


def task_lines(tasks: "Tasks") -> list[str]:
    """The means over tasks, and what else lm-eval says of a task."""
    lines = []
    if len(tasks.scores) > 1:
        lines += [f"Mean of acc: {percent(tasks.average['acc'])}"]
        lines += [f"Mean of acc_norm, or acc where there is none: {percent(tasks.average['acc_norm'])}"]
    for score in tasks.scores:
        others = [f"{name} {each.value:.4g}" for name, each in score.metrics.items() if name not in ACCURACIES]
        lines += [f"{score.task}: {', '.join(others)}"] if others else []
    return lines


def show_programs(title: str, found: "HumanEval") -> None:
    rows = [[name, with_error(each)] for name, each in found.rates.items()]
    print_table(f"{title}; HumanEval", ["", "of problems"], rows)
    how = f"at temperature {found.temperature:g}" if found.temperature else "greedy"
    failures = sorted(found.failures.items(), key=lambda each: -each[1])
    print_lines(
        [
            f"Problems: {found.problems}, programs for each: {found.samples}, {how}. Passed: {found.passed}.",
            *(f"{kind}: {count}" for kind, count in failures),
        ]
    )


def with_error(found: "Metric") -> str:
    error = found.standard_error
    return percent(found.value) if error is None else f"{percent(found.value)} ± {error:.2%}"


def decimals(value: float | None, digits: int) -> str:
    return "unknown" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"
