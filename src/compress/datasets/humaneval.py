"""HumanEval: 164 functions to be written, each with its tests (Chen et al., arXiv 2107.03374).

Hub: openai/openai_humaneval. In the folder of --data-dir: humaneval/HumanEval.jsonl.gz or .jsonl, as published.
"""

import gzip
import zlib
from pathlib import Path

from compress.datasets._hub import column, hub_table, plain_files
from compress.errors import Unavailable
from compress.models.untrusted import parse_json

REPOSITORY = "openai/openai_humaneval"
PLAIN = ("humaneval/HumanEval.jsonl.gz", "humaneval/HumanEval.jsonl")
LARGEST = 2**26  # bytes of a file, unpacked; the published one has some hundred thousand
FIELDS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")


def load_problems(data_dir: Path | None, limit: int | None = None) -> list[dict[str, str]]:
    """The problems, at most `limit`; all fields are text. Raises Unavailable where they cannot be had."""
    files = plain_files(data_dir, PLAIN)
    if files:
        return read_problems(files[0])[:limit]
    table = hub_table(REPOSITORY, data_dir, plain=PLAIN, split="test")
    columns = [column(table, field) for field in FIELDS]
    return [dict(zip(FIELDS, row, strict=True)) for row in zip(*columns, strict=True)][:limit]


def read_problems(file: Path) -> list[dict[str, str]]:
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as opened:
            content = opened.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        rows = [parse_json(line) for line in content.decode().split("\n") if line.strip()]
        problems = [{field: row[field] for field in FIELDS} for row in rows]
        if not problems or not all(isinstance(value, str) for each in problems for value in each.values()):
            raise ValueError("it has no problems, or one whose fields are not text")
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        reason = f"a problem lacks {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise Unavailable(f"{file} cannot be read: {reason}. Replace the file.") from error
    return problems
