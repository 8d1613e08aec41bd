"""Any task of lm-evaluation-harness, asked and judged by it: the extra `tasks`, and a hub for its data.

The model runs through lm-eval's own HFLM; only its softmax is told to be taken in float32.
"""

import difflib
import functools
import importlib.metadata
import importlib.util
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from compress.errors import Unavailable, UsageError
from compress.evaluation._scores import FORMATS, Metric, TaskScore

# Of errors that have no formula, such as that of a perplexity; lm-eval's own number takes minutes.
BOOTSTRAPS = 1000
INSTALL = "pip install compress-llm[tasks]"


def is_installed() -> bool:
    return importlib.util.find_spec("lm_eval") is not None


@functools.cache
def names() -> tuple[str, ...]:
    """Tasks, groups and tags of the lm-eval that is installed."""
    from lm_eval.tasks import TaskManager

    return tuple(sorted(TaskManager().all_tasks))


def check_name(name: str, on_files: Sequence[str]) -> None:
    """That lm-eval can be asked for a task that is no file. Raises UsageError or Unavailable, with what is meant."""
    known = {*names()} if is_installed() else {*FORMATS}
    if name not in known:
        close = difflib.get_close_matches(name, sorted(known | {*on_files}), n=1)
        guess = f" Did you mean {close[0]!r}?" if close else ""
        listed = ", ".join(sorted({*FORMATS, *on_files}))
        others = "all of lm-eval's" if is_installed() else f"with lm-eval all of its own ({INSTALL})"
        raise UsageError(f"Unknown task {name!r}.{guess} Available: {listed}; {others}.")
    if not is_installed():
        raise Unavailable(
            f"The task {name!r} is not on this machine. Put tasks/{name}.jsonl under --data-dir (COMPRESS_DATA_DIR), "
            f"or install lm-eval, which asks the hub for it: {INSTALL}."
        )


def fetch(tasks: Sequence[str]) -> None:
    """The tasks' data, before a model is loaded. Raises Unavailable where they cannot be had."""
    quiet()
    from lm_eval.tasks import get_task_dict

    with told(tasks):
        get_task_dict(list(tasks))


def score_tasks(
    tasks: Sequence[str], model: nn.Module, tokenizer: Any, *, batch_size: int, limit: int | None
) -> list[TaskScore]:
    """In the order of the tasks."""
    quiet()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    runner = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
    with told(tasks):
        found = simple_evaluate(
            model=runner, tasks=list(tasks), limit=limit, bootstrap_iters=BOOTSTRAPS, log_samples=False
        )
    source = f"lm-eval {importlib.metadata.version('lm-eval')}"
    return [read_score(task, source, found) for task in tasks]


def quiet() -> None:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


@contextmanager
def told(tasks: Sequence[str]) -> Iterator[None]:
    """What keeps lm-eval from a task, a missing network or package, in one line with the way out."""
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(". ")
        raise Unavailable(
            f"lm-eval cannot ask {', '.join(tasks)}: {reason}. Its data come from the hub; without a network put "
            "tasks/NAME.jsonl under --data-dir."
        ) from error


def read_score(task: str, source: str, found: Mapping[str, Any]) -> TaskScore:
    """A task's entry in lm-eval's result, whose keys are `metric,filter` and `metric_stderr,filter`."""
    entry = found.get("groups", {}).get(task) or found["results"][task]
    parts = [*found.get("group_subtasks", {}).get(task, []), task]
    counts = found.get("n-samples", {})
    metrics = {}
    for key, value in entry.items():
        name, _, kept_by = key.partition(",")
        if not kept_by or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = entry.get(f"{name}_stderr,{kept_by}")
        known = isinstance(error, int | float) and math.isfinite(error)
        metrics[name if kept_by == "none" else f"{name} ({kept_by})"] = Metric(
            float(value), float(error) if known else None
        )
    documents = sum(counts[part]["effective"] for part in parts if part in counts)
    return TaskScore(task, source, documents, metrics)
