"""Read what a user or a stranger wrote: paths, JSON, YAML, and files that libraries parse.

Loaders validate little, so a malformed file can raise any exception. `reading` turns it into one
line that names the file.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from compress.errors import CheckpointError, CompressError, UsageError

LARGEST = 2**26  # bytes of a JSON file; a report on 10 000 linears takes a twentieth
LONGEST = 300  # characters of a library's message: some repeat the value that they do not like
DEEPEST = 50  # levels of YAML; the time that it takes grows with the square of them
OPENING = (
    *(yaml.tokens.BlockSequenceStartToken, yaml.tokens.BlockMappingStartToken),
    *(yaml.tokens.FlowSequenceStartToken, yaml.tokens.FlowMappingStartToken),
)
CLOSING = (yaml.tokens.BlockEndToken, yaml.tokens.FlowSequenceEndToken, yaml.tokens.FlowMappingEndToken)


@contextmanager
def reading(what: str, remedy: str = "", *, kind: type[CompressError] = CheckpointError) -> Iterator[None]:
    """Make a library's errors ours. what: how the sentence begins: "The tokenizer of FOLDER cannot be read"."""
    try:
        yield
    except CompressError:
        raise
    except Exception as error:
        said = one_line(error)
        raise kind(f"{what}: {said.rstrip('. ')}. {remedy}" if remedy else f"{what}: {said}") from error


def one_line(error: Exception) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= LONGEST else f"{said[:LONGEST]}..."


def shown(names: Iterable[str]) -> str:
    first = list(names)
    return ", ".join(first[:3]) + (", ..." if len(first) > 3 else "")


def typed_path(name: str) -> Path:
    """Expand ~. Raises UsageError for what cannot be a path on this machine, or may not be accessed."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{name[:100]!r} cannot be used as a path: {reason}. Correct it.") from error
    return path


def parse_json(text: str) -> Any:
    """Raises JSONDecodeError for whatever cannot be used: numbers too long, objects too deep, halves of characters."""
    try:
        found = json.loads(text)
        if "\\u" in text:
            # Half of a pair can be said, but neither written nor shown nor cut into tokens.
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise json.JSONDecodeError(f"what cannot be used ({type(error).__name__})", text, 0) from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of a sensible size. Raises CheckpointError."""
    try:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing. Get it again.")
        if file.stat().st_size > LARGEST:
            raise CheckpointError(f"{file} is larger than any that is written ({LARGEST:,} bytes). Get it again.")
        found = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: it cannot be read as JSON. Get it again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} is damaged: it is no JSON object. Get it again.")
    return found


def parse_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """Return the data and its nodes, which know their lines. Raises ValueError for whatever cannot be read."""
    try:
        depth = 0
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            depth += isinstance(token, OPENING) - isinstance(token, CLOSING)
            if depth > DEEPEST:
                raise ValueError(f"it is nested more than {DEEPEST} levels deep")
        return yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    # A value that is not what its tag calls it comes out of yaml as any error.
    except Exception as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
