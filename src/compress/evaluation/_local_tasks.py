"""lm-eval's tasks on documents from a local file instead of the hub.

The documents have one of llm-foundry's three layouts (`datasets/tasks.py`). A task that lm-eval knows keeps its
prompts, choices and metrics: each document gets the columns of the hub's data set, and only the data are replaced. Any
other name is a new task that asks what the document says, without a prompt of its own.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Document = Mapping[str, Any]
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
