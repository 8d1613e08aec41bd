"""Documents of tasks from local files, `tasks/NAME.jsonl` in the folder of --data-dir; and HumanEval.

A line is a JSON object, and all lines of a file have one of llm-foundry's three layouts:

    query, choices, gold                  one context, several endings
    context_options, continuation, gold   several contexts, one ending (WinoGrande)
    context, continuation                 the next word (LAMBADA)

HumanEval has 164 functions to be written, each with its tests (Chen et al., arXiv 2107.03374). Hub:
openai/openai_humaneval. In the folder of --data-dir: humaneval/HumanEval.jsonl.gz or .jsonl, as published.
"""

import gzip
from pathlib import Path
from typing import Any

from compress.datasets._sources import column, hub_table, json_lines, plain_files
from compress.errors import Unavailable
from compress.models.untrusted import reading

LAYOUTS: tuple[dict[str, type], ...] = (
    {"query": str, "choices": list, "gold": int},
    {"context_options": list, "continuation": str, "gold": int},
    {"context": str, "continuation": str},
)
REPOSITORY = "openai/openai_humaneval"
PLAIN = ("humaneval/HumanEval.jsonl.gz", "humaneval/HumanEval.jsonl")
LARGEST = 2**26  # bytes of a file, unpacked; the published one has some hundred thousand
FIELDS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")


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


def load_problems(data_dir: Path | None, limit: int | None = None) -> list[dict[str, str]]:
    """HumanEval's problems, at most `limit`; all fields are text. Raises Unavailable where they cannot be had."""
    files = plain_files(data_dir, PLAIN)
    if not files:
        table = hub_table(REPOSITORY, data_dir, plain=PLAIN, split="test")
        columns = [column(table, field) for field in FIELDS]
        return [dict(zip(FIELDS, row, strict=True)) for row in zip(*columns, strict=True)][:limit]
    file, problems = files[0], []
    with reading(f"{file} cannot be read", "Replace the file.", kind=Unavailable):
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as opened:
            content = opened.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        text = content.decode()
    for where, row in json_lines(text, str(file)):
        if not isinstance(row, dict) or not all(isinstance(row.get(field), str) for field in FIELDS):
            raise Unavailable(f"{where} is no problem: it must have the texts {', '.join(FIELDS)}. Replace the file.")
        problems.append({field: row[field] for field in FIELDS})
    if not problems:
        raise Unavailable(f"{file} has no problems. Replace the file.")
    return problems[:limit]
