"""A plan and a result as tables."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compress.cli.reporting import gigabytes, print_json, print_lines, print_table

if TYPE_CHECKING:
    from compress.calibration.sites import Count
    from compress.pipeline.result import Result
    from compress.planning.plan import Plan
    from compress.planning.prepare import Job

BLOCK = re.compile(r"\.(\d+)\.(.*)")  # its number, and what is below it
KINDS = {"hidden": "hidden size", "neurons": "MLP neurons a block", "kv_groups": "KV groups a block"}


def show_plan(job: "Job", plan: "Plan", *, as_json: bool) -> None:
    if as_json:
        print_json({"out": str(job.out), **plan.to_dict()})
        return
    rows = [["written as", loads_as(plan.spec.architecture.class_name, is_stock=plan.spec.architecture.is_stock)]]
    rows += [["parameters, dense", f"{plan.dense.parameters:,}"]]
    if plan.choices:
        rows += [["shapes that fit", f"{len(plan.choices)}, see below; predicted, then chosen by at most three trials"]]
    elif plan.ranks is not None:
        rows += [["ranks", f"found from the dense model, by {' or '.join(plan.ranks.stage.allocations)}"]]
        rows += limit_rows(job, plan)
    elif plan.size is None:
        rows += [["widths", "decided by the data"]]
    else:
        if reshapes(job):
            rows += [["widths", spans([width or 0 for width in plan.widths])], *unit_rows(plan.units)]
        rows += size_rows(vars(plan.dense), vars(plan.size))
    rows += bits_rows(vars(each) for each in plan.alternatives)
    rows += [["memory, at most about", gigabytes(plan.memory_bytes)], ["disk, for the run", gigabytes(plan.disk_bytes)]]
    print_table(f"Plan: {job.model.name} to {job.out}", ["", "value"], rows)
    if plan.choices:
        show_choices(plan)
    show_ranks({path: factors.rank for path, factors in plan.factors.items()}, plan.spec.num_blocks)
    show_alternatives([vars(each) for each in plan.alternatives])
    print_lines(plan.notes)


def bits_rows(alternatives: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Of the plan, which is the first."""
    return [["bits a weight, all counted", f"{each['bits_per_weight']:.2f}"] for each in alternatives][:1]


def show_alternatives(alternatives: Sequence[Mapping[str, Any]]) -> None:
    if len(alternatives) < 2:
        return
    rows = [[each["name"], f"{each['bits_per_weight']:.2f}", gigabytes(each["bytes"])] for each in alternatives]
    print_table("At about as many bytes", ["stored as", "bits a weight", "bytes"], rows)


def reshapes(job: "Job") -> bool:
    return any(stage.reshapes for stage in job.recipe.stages)


def limit_rows(job: "Job", plan: "Plan") -> list[list[str]]:
    budget = job.recipe.budget
    if budget is None:
        return []
    if budget.target_size is not None:
        return [["bytes, at most", gigabytes(budget.target_size)]]
    return [["parameters, at most", f"{int((budget.keep_params or 0) * plan.dense.parameters):,}"]]


def show_ranks(ranks: Mapping[str, int], num_blocks: int) -> None:
    """A row for each linear of a block: its ranks from the first block to the last."""
    by_name: dict[str, list[int | str]] = {}
    for path, rank in ranks.items():
        match = BLOCK.search(path)
        assert match is not None
        by_name.setdefault(match[2], ["dense"] * num_blocks)[int(match[1])] = rank
    if by_name:
        print_table("Ranks", ["linear", "by block"], [[name, spans(each)] for name, each in by_name.items()])


def show_choices(plan: "Plan") -> None:
    kinds = list(plan.choices[0].counts)
    rows = [
        [*(f"{choice.counts[kind]:,}" for kind in kinds), f"{choice.size.parameters:,}", gigabytes(choice.size.bytes)]
        for choice in plan.choices
    ]
    columns = [KINDS[kind] for kind in kinds]
    print_table("Shapes that fit", [*columns, "parameters", "bytes"], rows)


def show_result(job: "Job", result: "Result", *, as_json: bool) -> None:
    if as_json:
        print_json(result.to_dict())
        return
    rows = [["written as", loads_as(result.architecture, is_stock=result.is_stock)]]
    if reshapes(job):
        rows += [["widths", spans(result.widths)], *unit_rows(result.units)]
    rows += [["parameters, dense", f"{result.dense.parameters:,}"]]
    rows += size_rows(vars(result.dense), vars(result.size))
    rows += bits_rows(result.alternatives)
    if result.lost is not None:
        rows += [["outputs' energy lost, a linear", f"{result.lost:.2%}"]]
    if result.divergence is not None:
        rows += [["divergence from dense, held out", f"{result.divergence:.3f} nats a token"]]
    seconds = result.seconds
    shares = ", ".join(f"{kind} {value:.1f}" for kind, value in seconds.items() if kind != "total")
    rows += [["seconds", f"{seconds['total']:.1f} ({shares})"], ["reloads", reloads(result.difference)]]
    print_table(f"{job.model.name} compressed: {result.out}", ["", "value"], rows)
    show_ranks(result.ranks, result.num_blocks)
    show_alternatives(result.alternatives)
    print_lines(result.notes)


def loads_as(architecture: str, *, is_stock: bool) -> str:
    return f"{architecture} ({'stock: no code of ours' if is_stock else 'ours, its code is carried along'})"


def reloads(difference: float | None) -> str:
    if difference is None:
        return "seen before the run was interrupted"
    return "with the same logits" if difference == 0 else f"with logits within {difference:.0e} of the largest"


def unit_rows(units: Mapping[str, "Count"]) -> list[list[str]]:
    if "neurons" not in units:
        return []
    count = units["neurons"]
    return [[KINDS["neurons"], spans(list(count)) if isinstance(count, tuple) else f"{count:,}"]]


def size_rows(dense: Mapping[str, int], compressed: Mapping[str, int]) -> list[list[str]]:
    removed = 1 - compressed["parameters"] / dense["parameters"]
    share = f"{removed:.1%} removed" if removed >= 0 else f"{-removed:.1%} added"
    return [
        ["parameters, compressed", f"{compressed['parameters']:,} ({share})"],
        ["bytes, dense", gigabytes(dense["bytes"])],
        ["bytes, compressed", gigabytes(compressed["bytes"])],
    ]


def spans(widths: Sequence[int | str]) -> str:
    """Widths with repetitions counted: 96 x 8, 128."""
    parts: list[str] = []
    start = 0
    for i in range(1, len(widths) + 1):
        if i == len(widths) or widths[i] != widths[start]:
            parts.append(f"{widths[start]}" + (f" x {i - start}" if i - start > 1 else ""))
            start = i
    return ", ".join(parts)
