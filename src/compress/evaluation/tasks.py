"""Tasks by lm-evaluation-harness (the extra `tasks`): its prompts, log-likelihoods and metrics, on a loaded model.

The documents are those of the hub, or of a local file in one of llm-foundry's three layouts (`datasets/texts.py`). A
task that lm-eval knows keeps its prompts, choices and metrics there: each document gets the columns of the hub's data
set, and only the data are replaced. Any other name is a new task that asks what the document says, without a prompt of
its own. The model runs through lm-eval's HFLM; only its softmax is told to be taken in float32.
"""

import difflib
import functools
import importlib.util
import io
import logging
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from compress.checkpoints.quality import Metric, TaskScore
from compress.datasets.texts import local_tasks, read_documents
from compress.errors import CompressError, Problems, Unavailable, UsageError
from compress.evaluation.windows import ignore
from compress.models.soundness import context_length, evaluating, no_number

# Resamples for the standard error of what is no mean, such as a perplexity; lm-eval's own number takes minutes.
BOOTSTRAPS = 1000
FEWSHOT_SEED = 1234  # as in lm_eval.simple_evaluate
Document = Mapping[str, Any]


def averages(scores: Sequence[TaskScore]) -> dict[str, float | None]:
    """Plain means over the tasks: of `acc`, as in SLiM, and of `acc_norm` where a task has it, as in SliceGPT.

    None where a task has no accuracy at all.
    """
    found: dict[str, float | None] = {}
    for preferred in (("acc",), ("acc_norm", "acc")):
        of_each = [[each.metrics[name].value for name in preferred if name in each.metrics] for each in scores]
        found[preferred[0]] = statistics.fmean(values[0] for values in of_each) if of_each and all(of_each) else None
    return found


@dataclass(frozen=True)
class LoadedTask:
    """A task or group of lm-eval's with its data. parts: its tasks by name, one unless it is a group."""

    name: str
    source: str
    group: Any
    parts: Mapping[str, Any]

    def num_requests(self, limit: int | None) -> int:
        """Likelihoods and texts that the model will be asked for: one for each choice of a document, else one."""
        count = 0
        for part in self.parts.values():
            documents = islice(part.eval_docs, limit)
            is_choice = part.OUTPUT_TYPE == "multiple_choice"
            count += sum(len(part.doc_to_choice(each)) if is_choice else 1 for each in documents)
        return count


def load_tasks(names: Sequence[str], data_dir: Path | None) -> list[LoadedTask]:
    """The tasks with their data, from a file where there is one, else from the hub. Raises all problems at once."""
    if names and importlib.util.find_spec("lm_eval") is None:
        raise UsageError("--tasks needs the package lm-eval: pip install 'compress-llm[tasks]'")
    files = local_tasks(data_dir) if names else {}
    problems, loaded = Problems(), list[LoadedTask]()
    for name in names:
        with problems.collect():
            if name in files:
                loaded.append(load_local_task(name, read_documents(files[name])))
            else:
                loaded += load_hub_task(name, sorted(files))
    problems.report()
    return loaded


def load_local_task(name: str, documents: Sequence[Document]) -> LoadedTask:
    """A task on the documents of a local file."""
    with silent(), reported(name):
        return LoadedTask(name, "files", None, {name: local_task(name, documents)})


def load_hub_task(name: str, local_names: Sequence[str]) -> list[LoadedTask]:
    """A task or group of lm-eval's, or all tasks of a tag, with data from the hub or its cache.

    local_names: of the tasks that are files, which a user who misspelt one may have meant.
    """
    with silent():
        manager = task_index(KNOWN[name][0] if name in KNOWN else None)
    if name not in manager.all_tasks:
        known = {*manager.all_tasks, *local_names}
        guess = "".join(f" Did you mean {close!r}?" for close in difflib.get_close_matches(name, known, n=1))
        files = f" Files: {', '.join(local_names)}." if local_names else ""
        raise UsageError(f"lm-eval has no task {name!r}.{guess}{files} `lm-eval ls tasks` lists all.")
    with silent(), reported(name):
        loaded = manager.load([name])
    if any(getattr(part, "UNSAFE_CODE", False) for part in loaded["tasks"].values()):
        raise UsageError(f"lm-eval's task {name!r} runs code that the model writes. Use --humaneval for such a task.")
    if name in loaded["groups"]:
        return [LoadedTask(name, "hub", loaded["groups"][name], loaded["tasks"])]
    return [LoadedTask(each, "hub", None, {each: task}) for each, task in loaded["tasks"].items()]


def score_tasks(
    tasks: Sequence[LoadedTask],
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    batch_size: int,
    limit: int | None = None,
    on_answer: Callable[[int], None] = ignore,
) -> list[TaskScore]:
    """In the order of the tasks. limit: documents of each. `on_answer` is told how many more requests are done."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    names = ", ".join(task.name for task in tasks)
    parts = {name: part for task in tasks for name, part in task.parts.items()}
    for part in parts.values():
        part.set_fewshot_seed(FEWSHOT_SEED)
    groups = {group.name: group for task in tasks if task.group for group in [task.group, *task.group.get_all_groups()]}
    with silent(), reported(names), evaluating(model):
        runner = HFLM(
            pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32"
        )
        runner.set_cache_hook(Answers(model, tokenizer, on_answer))
        # Not `simple_evaluate`, which is this and starts a dozen processes to describe the machine.
        found = lm_eval.evaluate(
            lm=runner,
            task_dict={"tasks": parts, "groups": groups},
            limit=limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
        )
    return [read_score(task, found) for task in tasks]


class Answers:
    """lm-eval's hook for finished requests: counts them, and raises NumericalError for a likelihood that is none."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, on_answer: Callable[[int], None]) -> None:
        self.model, self.tokenizer, self.on_answer = model, tokenizer, on_answer

    def add_partial(self, _kind: str, request: Sequence[Any], answer: Any) -> None:
        value = answer[0] if isinstance(answer, tuple) else answer
        if isinstance(value, float) and math.isnan(value):
            tokens = self.tokenizer("".join(request), verbose=False)["input_ids"]
            ids = torch.tensor([tokens[-context_length(self.model.config, self.tokenizer) :]], device=self.model.device)
            raise no_number(f"The likelihood of {request[-1][:40]!r} is no number", self.model, ids)
        self.on_answer(1)


@contextmanager
def silent() -> Iterator[None]:
    """Keep lm-eval's log, prints and progress bars out of our output, and let it resample in this process."""
    from tqdm import tqdm

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    shown = tqdm.__init__

    def hidden(bar: Any, *arguments: Any, **options: Any) -> None:
        shown(bar, *arguments, **options | {"disable": True})

    tqdm.__init__ = hidden
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.__init__ = shown


@contextmanager
def reported(names: str) -> Iterator[None]:
    """What keeps lm-eval from a task, such as a missing network or package, as one line with the way out."""
    try:
        yield
    except CompressError:
        raise
    except AssertionError as error:
        raise UsageError(
            f"lm-eval cannot ask {names}: an answer has no token of its own, or more than the model can read. "
            "Correct the task's file or leave the task out."
        ) from error
    # A task runs code of its own, which can raise anything.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(". ")
        raise Unavailable(
            f"lm-eval cannot ask {names}: {reason}. Data come from the hub, or from tasks/NAME.jsonl under --data-dir."
        ) from error


def read_score(task: LoadedTask, found: Mapping[str, Any]) -> TaskScore:
    """A task's entry in lm-eval's result, whose keys are `metric,filter` and `metric_stderr,filter`."""
    entry = found.get("groups", {}).get(task.name) or found["results"].get(task.name, {})
    metrics = {}
    for key, value in entry.items():
        name, _, kept_by = key.partition(",")
        if not kept_by or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = entry.get(f"{name}_stderr,{kept_by}")
        known = isinstance(error, int | float) and math.isfinite(error)
        metrics[name if kept_by == "none" else f"{name} ({kept_by})"] = Metric(
            value=float(value), standard_error=float(error) if known else None
        )
    documents = sum(found["n-samples"][part]["effective"] for part in task.parts)
    return TaskScore(task=task.name, source=task.source, documents=documents, metrics=metrics)


# Documents from a local file.

Columns = dict[str, Any]


def piqa(query: str, choices: list[str], gold: int) -> Columns:
    first, second = choices
    return {"goal": question(query), "sol1": first, "sol2": second, "label": gold}


def arc(query: str, choices: list[str], gold: int) -> Columns:
    labels = [str(number) for number in range(len(choices))]
    return {"question": question(query), "choices": {"text": choices, "label": labels}, "answerKey": labels[gold]}


def question(query: str) -> str:
    return query.removeprefix("Question: ").removesuffix("\n")


def boolq(query: str, choices: list[str], gold: int) -> Columns:
    """The answers are lm-eval's own."""
    if choices != ["no", "yes"]:
        raise ValueError("the choices must be no and yes")
    passage, _, asked = query.removeprefix("Passage: ").rpartition("\nQuestion: ")
    return {"passage": passage, "question": asked.removesuffix("?"), "label": gold}


def hellaswag(query: str, choices: list[str], gold: int) -> Columns:
    """What lm-eval makes of the hub's columns."""
    return {"query": query, "choices": choices, "label": gold}


def winogrande(context_options: list[str], continuation: str, gold: int) -> Columns:
    """lm-eval puts each option in the place of the sentence's first `_`."""
    first, second = context_options
    return {"sentence": f"_ {continuation}", "option1": first, "option2": second, "answer": str(gold + 1)}


def lambada(context: str, continuation: str) -> Columns:
    """lm-eval splits the text at its last blank."""
    if " " in continuation:
        raise ValueError("the continuation must be one word")
    return {"text": f"{context} {continuation}"}


# By task: its folder in lm-eval/tasks, and the hub's columns of a document.
KNOWN: dict[str, tuple[str, Callable[..., Columns]]] = {
    "arc_challenge": ("arc", arc),
    "arc_easy": ("arc", arc),
    "boolq": ("super_glue/boolq", boolq),
    "hellaswag": ("hellaswag", hellaswag),
    "lambada_openai": ("lambada", lambada),
    "piqa": ("piqa", piqa),
    "winogrande": ("winogrande", winogrande),
}
ACC, ACC_NORM = ({"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm"))
PERPLEXITY = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
# New tasks, by a field that tells the layout. An integer as doc_to_text means that the choices are contexts.
NEW: dict[str, dict[str, Any]] = {
    "query": {
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [ACC, ACC_NORM],
    },
    "context_options": {
        "output_type": "multiple_choice",
        "doc_to_text": "gold",
        "doc_to_choice": "context_options",
        "doc_to_target": "continuation",
        "metric_list": [ACC],
    },
    "context": {
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        "doc_to_target": "{{' ' + continuation}}",
        "metric_list": [PERPLEXITY, ACC],
    },
}


def local_task(name: str, documents: Sequence[Document]) -> Any:
    """lm-eval's task of this name, or a new one, on these documents. Raises ValueError for one that does not fit."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    folder, columns = KNOWN.get(name, (None, dict))
    table = datasets.Dataset.from_list([fitted(columns, *each) for each in enumerate(documents, 1)])
    # In memory: `dataset_path: json` would leave a copy of the file in the cache of `datasets`.
    data: dict[str, Any] = {"dataset_path": None, "dataset_name": None, "custom_dataset": lambda **_: {"test": table}}
    data |= {"training_split": None, "validation_split": None, "test_split": "test", "process_docs": None}
    if folder is None:
        layout = next(field for field in NEW if field in documents[0])
        return ConfigurableTask(config={"task": name, **NEW[layout], **data})
    # A group's members are where lm-eval lets the definition of a task be changed.
    loaded = task_index(folder).load([{"group": "local", "task": [{"task": name, **data}]}])
    return loaded["tasks"][name]


def fitted(columns: Callable[..., Columns], number: int, document: Document) -> Columns:
    try:
        return columns(**document)
    except (TypeError, ValueError) as error:
        reason = "it has another layout" if isinstance(error, TypeError) else str(error)
        raise ValueError(f"document {number} does not fit the task: {reason}") from error


@functools.cache
def task_index(folder: str | None) -> Any:
    """lm-eval's TaskManager for one of its folders of tasks, or for all: reading those takes 15 seconds or more."""
    from lm_eval import tasks

    if folder is None:
        return tasks.TaskManager()
    return tasks.TaskManager(include_path=f"{tasks.__path__[0]}/{folder}", include_defaults=False)
