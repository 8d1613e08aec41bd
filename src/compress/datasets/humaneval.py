"""HumanEval: 164 functions to be written, each with its tests (Chen et al., arXiv 2107.03374).

Hub: openai/openai_humaneval. In the folder of --data-dir: humaneval/HumanEval.jsonl.gz or .jsonl, as published.
"""

import gzip
from pathlib import Path

from compress.datasets._sources import column, hub_table, json_lines, plain_files
from compress.errors import Unavailable
from compress.models.untrusted import reading

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
    with reading(f"{file} cannot be read", "Replace the file.", kind=Unavailable):
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as opened:
            content = opened.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        text = content.decode()
    problems = []
    for where, row in json_lines(text, str(file)):
        if not isinstance(row, dict) or not all(isinstance(row.get(field), str) for field in FIELDS):
            raise Unavailable(f"{where} is no problem: it must have the texts {', '.join(FIELDS)}. Replace the file.")
        problems.append({field: row[field] for field in FIELDS})
    if not problems:
        raise Unavailable(f"{file} has no problems. Replace the file.")
    return problems
