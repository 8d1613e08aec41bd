"""Where the rows of a hub data set come from: plain files, a clone of its repository, or the hub, in this order.

The first two lie in the folder of --data-dir: plain files where each data set says, a clone under
<owner>/<name>. What the hub's client has cached before is found without a network.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import Unavailable

if TYPE_CHECKING:
    from datasets import Dataset

PROBE_SECONDS = 10.0


def plain_files(data_dir: Path | None, patterns: tuple[str, ...]) -> list[Path]:
    """The files of the first pattern that has any, by name."""
    if data_dir is None:
        return []
    return next((found for pattern in patterns if (found := sorted(data_dir.glob(pattern)))), [])


def plain_lines(file: Path) -> list[str]:
    """The lines of a text file with their ends. Only \\n ends one: texts have other characters that look like ends."""
    try:
        with file.open(encoding="utf-8", newline="\n") as text:
            return list(text)
    except (OSError, UnicodeDecodeError) as error:
        raise Unavailable(f"{file} cannot be read: {error}. Replace the file.") from error


def json_table(files: list[Path]) -> "Dataset":
    """The records of .json, .jsonl or .json.gz files."""
    with one_line(f"{files[0]} cannot be read", "Replace the file."):
        return load_dataset("json", data_files=[str(file) for file in files], split="train")


def hub_table(
    repository: str, data_dir: Path | None, *, plain: tuple[str, ...], revision: str | None = None, **options: Any
) -> "Dataset":
    """A split from a clone of the repository or from the hub. `plain` are the files that would have done."""
    places = f"{' or '.join(plain)}, or a clone of it as {repository},"
    remedy = f"Put {places} under --data-dir (COMPRESS_DATA_DIR), or name a text file instead."
    clone = data_dir / repository if data_dir else None
    if clone and clone.is_dir():
        with one_line(f"The clone {clone} cannot be read", "Clone it again, or name a text file instead."):
            return load_dataset(str(clone.resolve()), **options)
    with one_line(f"The data set {repository} is not on this machine and the hub does not give it", remedy):
        if not is_cached(repository):
            probe(repository)
        return load_dataset(repository, revision=revision, **options)


def column(table: "Dataset", name: str) -> list[str]:
    """A column of text as a list."""
    with one_line("The data set cannot be used", f"Each of its records must have a text {name!r}."):
        rows = list(table[name])
        if not all(isinstance(row, str) for row in rows):
            raise ValueError(f"{name!r} is not text")
        return rows


def load_dataset(path: str, **options: Any) -> "Dataset":
    import datasets

    # A part of a repository is enough: its counts are those of the whole.
    return datasets.load_dataset(path, verification_mode="no_checks", **options)


def is_cached(repository: str) -> bool:
    from datasets import config

    return (Path(config.HF_DATASETS_CACHE) / repository.replace("/", "___")).is_dir()


def probe(repository: str) -> None:
    """One request: `datasets` itself would try an unreachable hub for half a minute."""
    from huggingface_hub import HfApi

    HfApi().dataset_info(repository, timeout=PROBE_SECONDS)


@contextmanager
def one_line(problem: str, remedy: str) -> Iterator[None]:
    """Whatever keeps `datasets` from a text, a missing network or a damaged file, in one line with the way out."""
    try:
        from datasets.exceptions import DatasetsError

        # Of httpx or its successor, whichever this version of the hub's client uses.
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined,unused-ignore]
    except ImportError as error:
        raise Unavailable(f"{problem}: the package {error.name!r} is missing. Install it with pip.") from error
    try:
        yield
    except (OSError, HTTPError, ValueError, KeyError, RuntimeError, DatasetsError) as error:
        # A DatasetsError often says no more than that there was an error.
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        reason = next(iter(str(cause).splitlines()), type(cause).__name__).rstrip(". ")
        raise Unavailable(f"{problem}: {reason}. {remedy}") from error
