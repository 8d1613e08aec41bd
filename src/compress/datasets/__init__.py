"""The texts that models are calibrated and evaluated on.

A data set is a function of `texts.py`. Rows are joined with a blank line, SEPARATOR. A file of the user's is a text
too: its whole text is every split.
"""

import os
from pathlib import Path

from compress.datasets._sources import is_file, read_rows
from compress.datasets.texts import DATA_SETS, LICENSES, REPOSITORIES
from compress.errors import UsageError, unknown_name
from compress.models.untrusted import typed_path

SEPARATOR = "\n\n"
DATA_DIR_VARIABLE = "COMPRESS_DATA_DIR"


def load_rows(source: str, split: str, data_dir: Path | None) -> list[str]:
    """The rows of a data set's split, or of a text file."""
    if is_file(source):
        rows = read_rows(source, data_sets=DATA_SETS)
    elif source in DATA_SETS:
        rows = DATA_SETS[source](split, data_dir)
    else:
        raise UsageError(unknown_name("data set", source, DATA_SETS) + " A .txt or .jsonl file works too.")
    if not any(row.strip() for row in rows):
        raise UsageError(f"The text {source!r} is empty. Name another one.")
    return rows


def about(source: str) -> dict[str, str | None]:
    """Of a data set its repository on the hub and, where it is one to be told of, its license; None of a file."""
    return {"repository": REPOSITORIES.get(source), "license": LICENSES.get(source)}


def data_directory(option: Path | None) -> Path | None:
    """The folder of local data sets: --data-dir, else COMPRESS_DATA_DIR, else none."""
    asked = option or os.environ.get(DATA_DIR_VARIABLE)
    if not asked:
        return None
    folder = typed_path(str(asked))
    if not folder.is_dir():
        asked_by = "--data-dir" if option else DATA_DIR_VARIABLE
        raise UsageError(f"{asked_by} must be a folder, {str(asked)!r} is none. Create it or correct the path.")
    return folder
