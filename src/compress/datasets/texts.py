"""The data sets: a function each, named as the user names it, that gives the rows of a split: train, validation, test.

    wikitext2  WikiText-2, raw, version 1 (Merity et al., arXiv 1609.07843), the text of most published perplexities. A
               row is a line of the original file with its line end; a blank line is the row "".
    ptb        The Penn Treebank as prepared for language models (Mikolov et al., 2010). A row is a sentence. From the
               branch refs/convert/parquet: the main one is a script, which `datasets` no longer runs.
    c4         The Colossal Clean Crawled Corpus, English (Raffel et al., arXiv 1910.10683), one shard of each split as
               in GPTQ and SparseGPT. A row is a web page. There is no test split: `test` is the first 1100 pages of the
               validation shard, the text GPTQ evaluates on (256 windows of 2048 tokens and a few more); GPTQ joins them
               with a blank instead.
    alpaca     Instructions with their answers (Taori et al., 2023), SliceGPT's text for instruction-tuned models: the
               instruction in its prompt and the answer. One split, cut as SliceGPT's code does: 80% train, 10% test,
               10% validation, seed 42.
    stdlib     The source text of the running Python's own standard library: it needs no network, so every command runs
               on a fresh machine. A row is a file, which belongs to a split for good, by the hash of its path: 1/16 of
               them are test, 1/16 validation. Tests and generated tables are left out (some distributions do not
               install them, and a model learns nothing from a code page). Perplexities on it compare only within one
               version of Python.

In the folder of --data-dir: wikitext-2/wiki.{train,valid,test}.raw, else any wikitext-2/wiki.{train,valid,test}*.raw (a
part of the split); ptb/ptb.{train,valid,test}.txt, a sentence a line; c4/c4-{train,validation}*.json.gz or .jsonl, of
which the first is read; alpaca/*.json or alpaca/*.jsonl, all records, each with a field `text`.

Documents of tasks from local files, `tasks/NAME.jsonl` in the folder of --data-dir; and HumanEval.

A line is a JSON object, and all lines of a file have one of llm-foundry's three layouts:

    query, choices, gold                  one context, several endings
    context_options, continuation, gold   several contexts, one ending (WinoGrande)
    context, continuation                 the next word (LAMBADA)

HumanEval has 164 functions to be written, each with its tests (Chen et al., arXiv 2107.03374). In the folder of
--data-dir: humaneval/HumanEval.jsonl.gz or .jsonl, as published.
"""

import gzip
import hashlib
import sysconfig
from pathlib import Path
from typing import Any

from compress.datasets._sources import column, hub_table, json_lines, json_table, obtained, plain_files, plain_lines
from compress.errors import Unavailable
from compress.models.untrusted import reading

REPOSITORIES = {
    "alpaca": "tatsu-lab/alpaca",
    "c4": "allenai/c4",
    "ptb": "ptb-text-only/ptb_text_only",
    "wikitext2": "Salesforce/wikitext",
}
LICENSES = {"alpaca": "CC BY-NC 4.0"}  # its answers are a model's of OpenAI, and not for commercial use
FILE_SPLIT = {"train": "train", "validation": "valid", "test": "test"}
SHARD = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
TEST_PAGES = 1100  # of c4
ALPACA_SEED = 42
LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"})


def wikitext2(split: str, data_dir: Path | None = None) -> list[str]:
    plain = tuple(f"wikitext-2/wiki.{FILE_SPLIT[split]}{suffix}" for suffix in (".raw", "*.raw"))
    if files := plain_files(data_dir, plain):
        return [line if line.strip() else "" for line in plain_lines(files[0])]
    name = "wikitext-2-raw-v1"
    return column(hub_table(REPOSITORIES["wikitext2"], data_dir, plain=plain[:1], name=name, split=split), "text")


def ptb(split: str, data_dir: Path | None = None) -> list[str]:
    plain = (f"ptb/ptb.{FILE_SPLIT[split]}.txt",)
    if files := plain_files(data_dir, plain):
        return [line.strip() for line in plain_lines(files[0])]
    revision = "refs/convert/parquet"
    return column(hub_table(REPOSITORIES["ptb"], data_dir, plain=plain, revision=revision, split=split), "sentence")


def c4(split: str, data_dir: Path | None = None) -> list[str]:
    part = "train" if split == "train" else "validation"
    plain = (f"c4/c4-{part}*.json.gz", f"c4/c4-{part}*.jsonl")
    if files := plain_files(data_dir, plain):
        table = json_table(files[:1])
    else:
        table = hub_table(REPOSITORIES["c4"], data_dir, plain=plain, data_files={part: SHARD[part]}, split=part)
    return column(table, "text")[: TEST_PAGES if split == "test" else None]


def alpaca(split: str, data_dir: Path | None = None) -> list[str]:
    plain = ("alpaca/*.json", "alpaca/*.jsonl")
    files = plain_files(data_dir, plain)
    table = json_table(files) if files else hub_table(REPOSITORIES["alpaca"], data_dir, plain=plain, split="train")
    with obtained("The data set alpaca cannot be split", "Give it at least ten records."):
        outer = table.train_test_split(test_size=0.2, seed=ALPACA_SEED)
        held_out = outer["test"].train_test_split(test_size=0.5, seed=ALPACA_SEED)
    splits = {"train": outer["train"], "test": held_out["train"], "validation": held_out["test"]}
    return column(splits[split], "text")


def stdlib(split: str, data_dir: Path | None = None) -> list[str]:
    """In the order of the files' paths."""
    rows, root = [], library_root()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if LEFT_OUT.isdisjoint(relative.parts) and split_of(relative.as_posix()) == split:
            rows.append(path.read_text(encoding="utf-8", errors="replace"))
    if not rows:
        raise Unavailable(f"The standard library has no source files under {root}. Name a text file instead.")
    return rows


def library_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def split_of(relative_path: str) -> str:
    sixteenth = hashlib.sha256(relative_path.encode()).digest()[0] % 16
    return {0: "test", 1: "validation"}.get(sixteenth, "train")


DATA_SETS = {load.__name__: load for load in (alpaca, c4, ptb, stdlib, wikitext2)}


LAYOUTS: tuple[dict[str, type], ...] = (
    {"query": str, "choices": list, "gold": int},
    {"context_options": list, "continuation": str, "gold": int},
    {"context": str, "continuation": str},
)
HUMANEVAL = "openai/openai_humaneval"
HUMANEVAL_FILES = ("humaneval/HumanEval.jsonl.gz", "humaneval/HumanEval.jsonl")
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
    files = plain_files(data_dir, HUMANEVAL_FILES)
    if not files:
        table = hub_table(HUMANEVAL, data_dir, plain=HUMANEVAL_FILES, split="test")
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
