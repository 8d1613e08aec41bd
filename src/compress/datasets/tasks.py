"""Documents of multiple-choice tasks and of LAMBADA from plain files: `tasks/NAME.jsonl` in the folder of --data-dir.

A line is a JSON object in one of three layouts, which are llm-foundry's:

    query, choices, gold                  one context, several endings
    context_options, continuation, gold   several contexts, one ending (WinoGrande)
    context, continuation                 the next word (LAMBADA)
"""

import json
from pathlib import Path
from typing import Any

from compress.errors import Unavailable
from compress.models.json_text import parse_json

FOLDER = "tasks"
LAYOUTS: tuple[dict[str, type], ...] = (
    {"query": str, "choices": list, "gold": int},
    {"context_options": list, "continuation": str, "gold": int},
    {"context": str, "continuation": str},
)


def names(data_dir: Path | None) -> list[str]:
    """The tasks that the folder has."""
    return [] if data_dir is None else sorted(file.stem for file in (data_dir / FOLDER).glob("*.jsonl"))


def load_documents(name: str, data_dir: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The documents of a task, at most `limit`. Raises Unavailable for a file that is missing or damaged."""
    file = data_dir / FOLDER / f"{name}.jsonl"
    try:
        # Not splitlines: a JSON string may hold a bare U+2028.
        lines = file.read_bytes().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise Unavailable(f"{file} cannot be read: {error}. Replace the file.") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise Unavailable(f"{file} has no documents. Replace the file.")
    return [document(line, f"{file}, line {number}") for number, line in numbered[:limit]]


def document(line: str, where: str) -> dict[str, Any]:
    try:
        found = parse_json(line)
    except json.JSONDecodeError as error:
        raise Unavailable(f"{where} is not JSON: {error.msg}. Replace the file.") from error
    if not isinstance(found, dict) or not any(fits(found, layout) for layout in LAYOUTS):
        layouts = " or ".join(", ".join(layout) for layout in LAYOUTS)
        raise Unavailable(f"{where} is no document of a task: it must have {layouts}. Replace the file.")
    return found


def fits(found: dict[str, Any], layout: dict[str, type]) -> bool:
    if not all(isinstance(found.get(key), kind) for key, kind in layout.items()):
        return False
    options = next((found[key] for key in ("choices", "context_options") if key in layout), None)
    if options is None:
        return True
    return len(options) > 1 and all(isinstance(option, str) for option in options) and 0 <= found["gold"] < len(options)
