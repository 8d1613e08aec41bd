"""A tuning, planned or done, as tables."""

import math
from typing import TYPE_CHECKING, Any

from compress.cli.reporting import gigabytes, print_json, print_lines, print_table
from compress.cli.tables import reloads

if TYPE_CHECKING:
    from compress.tuning.looking import Prepared
    from compress.tuning.tuner import Result

WHAT = {
    "lora": "a LoRA",
    "factors": "the factors",
    "adapters": "the adapters",
    "all": "all weights",
}


def show_plan(prepared: "Prepared", *, as_json: bool) -> None:
    settings, job = prepared.job.settings, prepared.job
    if as_json:
        print_json(plan_data(prepared))
        return
    rows = [
        ["trained", f"{WHAT[prepared.what]}, {prepared.num_trained:,} numbers"],
        ["steps", f"{prepared.steps:,} of {settings.batch_size} windows of {settings.seq_len} tokens"],
        ["text", f"{settings.data}, {len(prepared.texts.train):,} windows"],
        ["held out", f"{len(prepared.texts.held_out)} windows"],
        ["towards", towards(prepared)],
        ["learning rate, at most", str(prepared.rate)],
    ]
    print_table(f"Plan: {job.model.name} to {job.out}", ["", "value"], rows)


def towards(prepared: "Prepared") -> str:
    teacher = prepared.job.teacher
    if teacher is None:
        return "the text's next tokens"
    return f"the distribution of {teacher.name}"


def plan_data(prepared: "Prepared") -> dict[str, Any]:
    settings, job = prepared.job.settings, prepared.job
    return {
        "out": str(job.out),
        "trained": prepared.what,
        "trained_parameters": prepared.num_trained,
        "merge": prepared.merge,
        "steps": prepared.steps,
        "windows": len(prepared.texts.train),
        "seq_len": settings.seq_len,
        "batch_size": settings.batch_size,
        "learning_rate": prepared.rate.highest,
        "relative_rate": prepared.rate.relative,
        "teacher": None if job.teacher is None else job.teacher.name,
    }


def show_tuning(result: "Result", *, as_json: bool) -> None:
    if as_json:
        print_json(result.to_dict())
        return
    tuning = result.tuning.to_dict()
    rows = [
        ["trained", f"{WHAT[tuning['trained']]}, {tuning['trained_parameters']:,} numbers"],
        ["steps", f"{tuning['steps']:,} of {tuning['planned_steps']:,}, the best after {tuning['best_step']:,}"],
        ["perplexity, held out", change(tuning["held_out"])],
    ]
    if tuning["other_text"] is not None:
        rows += [[f"perplexity, {tuning['other_text']['source']}", change(tuning["other_text"])]]
    rows += [
        ["bytes", gigabytes(result.bytes)],
        ["seconds", f"{result.seconds:.1f}"],
        ["reloads", reloads(result.difference)],
    ]
    print_table(f"Tuned: {result.out}", ["", "value"], rows)
    print_lines(result.notes)


def change(found: dict[str, Any]) -> str:
    """From losses to perplexities, and which share of what was lost has come back, where the dense model was asked."""
    said = f"{math.exp(found['before']):.2f} to {math.exp(found['after']):.2f}"
    dense = found.get("dense")
    if dense is None or found["before"] <= dense:
        return said
    share = (found["before"] - found["after"]) / (found["before"] - dense)
    return f"{said}, dense {math.exp(dense):.2f}: {share:.0%} of the loss is won back"
