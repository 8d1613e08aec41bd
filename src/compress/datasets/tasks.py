"""Documents of tasks from local files: `tasks/NAME.jsonl` in the folder of --data-dir.

A line is a JSON object, and all lines of a file have one of llm-foundry's three layouts:

    query, choices, gold                  one context, several endings
    context_options, continuation, gold   several contexts, one ending (WinoGrande)
    context, continuation                 the next word (LAMBADA)
"""

from pathlib import Path
from typing import Any

from compress.datasets._sources import json_lines
from compress.errors import Unavailable
from compress.models.untrusted import reading

LAYOUTS: tuple[dict[str, type], ...] = (
    {"query": str, "choices": list, "gold": int},
    {"context_options": list, "continuation": str, "gold": int},
    {"context": str, "continuation": str},
)


def local_tasks(data_dir: Path | None) -> dict[str, Path]:
    """The files of the folder's tasks, by the tasks' names."""
    return {} if data_dir is None else {file.stem: file for file in sorted((data_dir / "tasks").glob("*.jsonl"))}


def read_documents(file: Path) -> list[dict[str, Any]]:
    """The documents of a task, with the fields of their layout. Raises Unavailable for a damaged file."""
    with reading(f"{file} cannot be read", "Replace the file.", kind=Unavailable):
        text = file.read_bytes().decode("utf-8")
    documents = []
    for where, found in json_lines(text, str(file)):
        layout = next((each for each in LAYOUTS if isinstance(found, dict) and fits(found, each)), None)
        if layout is None:
            layouts = " or ".join(", ".join(each) for each in LAYOUTS)
            raise Unavailable(f"{where} is no document of a task: it must have {layouts}. Replace the file.")
        documents.append({field: found[field] for field in layout})
    if not documents:
        raise Unavailable(f"{file} has no documents. Replace the file.")
    if any(each.keys() != documents[0].keys() for each in documents):
        raise Unavailable(f"{file} has documents of several layouts. Give each layout a file.")
    return documents


def fits(found: dict[str, Any], layout: dict[str, type]) -> bool:
    if any(type(found.get(key)) is not kind for key, kind in layout.items()) or found.get("continuation") == "":
        return False
    options = next((found[key] for key in ("choices", "context_options") if key in layout), None)
    if options is None:
        return True
    are_texts = all(isinstance(each, str) and each for each in options)
    return are_texts and len(options) > 1 and found["gold"] in range(len(options))
