"""Text files of the user's: plain text is one row, .jsonl has a row per line in its field `text`.

The text is taken as it is: UTF-8, line ends untouched.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from compress.errors import UsageError
from compress.models.untrusted import parse_json, typed_path

SUFFIXES = (".txt", ".jsonl")
FIELD = "text"


def is_file(source: str) -> bool:
    """Whether a user's word for a text means a file: it has a folder or the suffix of a text in it."""
    separators = {"/", os.sep}
    return source.lower().endswith(SUFFIXES) or not separators.isdisjoint(source)


def read_rows(source: str, *, data_sets: Iterable[str]) -> list[str]:
    """The rows of a text file. `data_sets` are what a user who misspelt one may have meant."""
    path = typed_path(source)
    if not path.is_file():
        raise UsageError(f"There is no text file {source!r}. Correct the path or name one of: {', '.join(data_sets)}.")
    text = decode(path)
    return json_rows(text, path) if path.suffix.lower() == ".jsonl" else [text]


def decode(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UsageError(
            f"{str(path)!r} is not UTF-8 text: byte 0x{byte:02x} at offset {error.start}. Convert it to UTF-8."
        ) from error
    except OSError as error:
        raise UsageError(f"{str(path)!r} cannot be read: {error.strerror}.") from error


def json_rows(text: str, path: Path) -> list[str]:
    """The field `text` of each line; blank lines are skipped."""
    # Not splitlines: a JSON string may hold a bare U+2028.
    lines = text.split("\n")
    return [json_row(line, f"{str(path)!r}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def json_row(line: str, where: str) -> str:
    try:
        row = parse_json(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} is not JSON: {error.msg}. Each line must be an object with a {FIELD!r}.") from error
    if not isinstance(row, dict) or not isinstance(row.get(FIELD), str):
        raise UsageError(f"{where} has no string {FIELD!r}. Each line must be an object with a {FIELD!r}.")
    return row[FIELD]
