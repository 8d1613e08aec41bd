"""Where the rows of a text come from: a file of the user's, or for a data set plain files, a clone or the hub.

A user's plain text is one row, .jsonl has a row per line in its field `text`; it is taken as it is: UTF-8, line ends
untouched. Of a data set, plain files where it says and a clone under <owner>/<name> lie in the folder of --data-dir and
come first. What the hub's client has cached before is found without a network.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError, Unavailable, UsageError
from compress.models.untrusted import parse_json, reading, typed_path

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".txt", ".jsonl")
FIELD = "text"
PROBE_SECONDS = 10.0


def is_file(source: str) -> bool:
    """Whether a user's word for a text means a file: it has a folder or the suffix of a text in it."""
    return source.lower().endswith(SUFFIXES) or not {"/", os.sep}.isdisjoint(source)


def read_rows(source: str, *, data_sets: Iterable[str]) -> list[str]:
    """The rows of a text file. `data_sets` are what a user who misspelt one may have meant."""
    path = typed_path(source)
    if not path.is_file():
        raise UsageError(f"There is no text file {source!r}. Correct the path or name one of: {', '.join(data_sets)}.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UsageError(
            f"{str(path)!r} is not UTF-8 text: byte 0x{byte:02x} at offset {error.start}. Convert it to UTF-8."
        ) from error
    except OSError as error:
        raise UsageError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    if path.suffix.lower() != ".jsonl":
        return [text]
    rows, remedy = [], f"Each line must be an object with a {FIELD!r}."
    for where, row in json_lines(text, repr(str(path)), remedy, kind=UsageError):
        if not isinstance(row, dict) or not isinstance(row.get(FIELD), str):
            raise UsageError(f"{where} has no string {FIELD!r}. {remedy}")
        rows.append(row[FIELD])
    return rows


def json_lines(
    text: str, name: str, remedy: str = "Replace the file.", *, kind: type[CompressError] = Unavailable
) -> Iterator[tuple[str, Any]]:
    """Where each line is and the JSON that it holds; blank lines are skipped."""
    # Not splitlines: a JSON string may hold a bare U+2028.
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{name}, line {number}"
        try:
            if line.strip():
                yield where, parse_json(line)
        except json.JSONDecodeError as error:
            raise kind(f"{where} is not JSON: {error.msg}. {remedy}") from error


def plain_files(data_dir: Path | None, patterns: tuple[str, ...]) -> list[Path]:
    """The files of the first pattern that has any, by name."""
    if data_dir is None:
        return []
    return next((found for pattern in patterns if (found := sorted(data_dir.glob(pattern)))), [])


def plain_lines(file: Path) -> list[str]:
    """The lines of a text file with their ends. Only \\n ends one: texts have other characters that look like ends."""
    with obtained(f"{file} cannot be read", "Replace the file."), file.open(encoding="utf-8", newline="\n") as text:
        return list(text)


def json_table(files: list[Path]) -> "Dataset":
    """The records of .json, .jsonl or .json.gz files."""
    with obtained(f"{files[0]} cannot be read", "Replace the file."):
        return load_dataset("json", data_files=[str(file) for file in files], split="train")


def hub_table(
    repository: str, data_dir: Path | None, *, plain: tuple[str, ...], revision: str | None = None, **options: Any
) -> "Dataset":
    """A split from a clone of the repository or from the hub. `plain` are the files that would have done."""
    clone = data_dir / repository if data_dir else None
    if clone and clone.is_dir():
        with obtained(f"The clone {clone} cannot be read", "Clone it again, or name a text file instead."):
            return load_dataset(str(clone.resolve()), **options)
    places = f"{' or '.join(plain)}, or a clone of it as {repository},"
    with obtained(
        f"The data set {repository} is not on this machine and the hub does not give it",
        f"Put {places} under --data-dir (COMPRESS_DATA_DIR), or name a text file instead.",
    ):
        probe(repository)
        return load_dataset(repository, revision=revision, **options)


def column(table: "Dataset", name: str) -> list[str]:
    with obtained("The data set cannot be used", f"Each of its records must have a text {name!r}."):
        rows = list(table[name])
        if not all(isinstance(row, str) for row in rows):
            raise ValueError(f"{name!r} is not text")
        return rows


def load_dataset(path: str, **options: Any) -> "Dataset":
    import datasets

    # A part of a repository is enough: its counts are those of the whole.
    return datasets.load_dataset(path, verification_mode="no_checks", **options)


def probe(repository: str) -> None:
    """One request where nothing is cached: `datasets` itself would try an unreachable hub for half a minute."""
    from datasets import config
    from huggingface_hub import HfApi

    if not (Path(config.HF_DATASETS_CACHE) / repository.replace("/", "___")).is_dir():
        HfApi().dataset_info(repository, timeout=PROBE_SECONDS)


@contextmanager
def obtained(problem: str, remedy: str) -> Iterator[None]:
    """Whatever keeps `datasets` from a text, a missing network or a damaged file, in one line with the way out."""
    from datasets.exceptions import DatasetsError

    with reading(problem, remedy, kind=Unavailable):
        try:
            yield
        except DatasetsError as error:
            raise error.__cause__ or error from None  # its own text often says no more than that there was an error
