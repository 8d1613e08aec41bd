"""The texts: where their rows come from, their row conventions, and what a user reads when one is missing.

Nothing here uses a network: the hub is either offline by its client's own switch or a stand-in that notes the request.
"""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import datasets as hub_datasets
import pytest
from datasets import Dataset

from compress import datasets
from compress.datasets import _sources, texts
from compress.errors import Unavailable, UsageError

DEVELOPMENT_DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test reads or fills the user's cache of data sets."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(hub_datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(hub_datasets.config, "DOWNLOADED_DATASETS_PATH", cache / "downloads")
    monkeypatch.setattr(hub_datasets.config, "EXTRACTED_DATASETS_PATH", cache / "extracted")
    return cache


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def hub(monkeypatch):
    """A hub that gives one table for every request and notes the requests."""
    hub = SimpleNamespace(requests=[], table=None)

    def load_dataset(path, **options):
        hub.requests.append((path, options))
        return hub.table

    monkeypatch.setattr(_sources, "probe", lambda repository: None)
    monkeypatch.setattr(hub_datasets, "load_dataset", load_dataset)
    return hub


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "wikitex",
            "Unknown data set 'wikitex'. Did you mean 'wikitext2'? Available: alpaca, c4, ptb, stdlib, wikitext2. "
            "A .txt or .jsonl file works too.",
        ),
        (
            "data/my.txt",
            "There is no text file 'data/my.txt'. Correct the path or name one of: alpaca, c4, ptb, stdlib, wikitext2.",
        ),
    ],
)
def test_what_there_is_not(name, said):
    with pytest.raises(UsageError) as error:
        datasets.load_rows(name, "test", None)
    assert str(error.value) == said


def test_plain_text_is_one_row_as_it_is(tmp_path):
    file = write(tmp_path / "a.txt", "\ufeffone\r\n\r\ntwo\u2028three\n")
    assert datasets.load_rows(str(file), "test", None) == ["one\r\n\r\ntwo\u2028three\n"]


def test_json_lines_give_a_row_each(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"text": "one\\n"}\n\n{"id": 2, "text": "t\u2028wo"}')
    assert datasets.load_rows(str(file), "train", None) == ["one\n", "t\u2028wo"]


EMPTY, LINE = "The text {} is empty. Name another one.", "{}, line 3 {} Each line must be an object with a 'text'."
NO_TEXT = LINE.replace("{} Each", "has no string 'text'. Each")
BAD_TEXTS = [
    ("a.txt", " \n\n", EMPTY),
    ("a.jsonl", '{"text": " "}\n', EMPTY),
    ("a.txt", b"caf\xe9 au lait", "{} is not UTF-8 text: byte 0xe9 at offset 3. Convert it to UTF-8."),
    ("a.jsonl", '{"text": "fine"}\n\n{"text": ', LINE.replace("{} Each", "is not JSON: Expecting value. Each")),
    *(("a.jsonl", '{"text": "fine"}\n\n' + line, NO_TEXT) for line in ('{"content": "a"}', '{"text": 3}', '["text"]')),
]


@pytest.mark.parametrize(("name", "content", "said"), BAD_TEXTS)
def test_a_text_that_cannot_be_used(tmp_path, name, content, said):
    file = write(tmp_path / name, content)
    with pytest.raises(UsageError) as error:
        datasets.load_rows(str(file), "train", None)
    assert str(error.value) == said.format(repr(str(file)))


# Plain files


def test_a_row_is_a_line_and_a_blank_line_is_empty(tmp_path):
    write(tmp_path / "ptb" / "ptb.valid.txt", " consumers may want \n to move <unk> \n")
    assert texts.ptb("validation", tmp_path) == ["consumers may want", "to move <unk>"]
    write(tmp_path / "wikitext-2" / "wiki.valid.raw", " \n = Title = \n \n One\x85two\u2028three . \n")
    assert texts.wikitext2("validation", tmp_path) == ["", " = Title = \n", "", " One\x85two\u2028three . \n"]


@pytest.mark.skipif(not DEVELOPMENT_DATA.is_dir(), reason="the development data is not on this machine")
def test_wikitext2_text_of_the_papers():
    rows = datasets.load_rows("wikitext2", "test", DEVELOPMENT_DATA)
    assert len(rows) == 4358
    assert rows[:4] == ["", " = Robert Boulter = \n", "", rows[3]]
    digest = hashlib.sha256(datasets.SEPARATOR.join(rows).encode()).hexdigest()
    assert digest == "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83"


def test_alpaca_is_split_as_in_the_reference(tmp_path):
    rows = [f"instruction {number}" for number in range(50)]
    write(tmp_path / "alpaca" / "alpaca.json", json.dumps([{"text": text, "input": ""} for text in rows]))
    outer = Dataset.from_dict({"text": rows}).train_test_split(test_size=0.2, seed=42)
    held_out = outer["test"].train_test_split(test_size=0.5, seed=42)
    assert texts.alpaca("train", tmp_path) == list(outer["train"]["text"])
    assert texts.alpaca("test", tmp_path) == list(held_out["train"]["text"])
    assert texts.alpaca("validation", tmp_path) == list(held_out["test"]["text"])
    splits = [texts.alpaca(split, tmp_path) for split in ("train", "validation", "test")]
    assert [len(split) for split in splits] == [40, 5, 5]
    assert sorted(text for split in splits for text in split) == sorted(rows)


@pytest.mark.parametrize(
    ("name", "repository", "column", "options"),
    [
        ("wikitext2", "Salesforce/wikitext", "text", {"name": "wikitext-2-raw-v1", "split": "test"}),
        ("ptb", "ptb-text-only/ptb_text_only", "sentence", {"revision": "refs/convert/parquet", "split": "test"}),
        (
            "c4",
            "allenai/c4",
            "text",
            {"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}, "split": "validation"},
        ),
        ("alpaca", "tatsu-lab/alpaca", "text", {"split": "train"}),
    ],
)
def test_what_is_asked_of_the_hub(hub, tmp_path, name, repository, column, options):
    hub.table = Dataset.from_dict({column: [f"row {number}" for number in range(10)]})
    rows = datasets.load_rows(name, "test", tmp_path)
    assert set(rows) <= set(hub.table[column])
    [(path, asked)] = hub.requests
    assert path == repository
    assert {key: value for key, value in asked.items() if value is not None} == {
        "verification_mode": "no_checks",
        **options,
    }


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["alpaca", "ptb"])
def test_offline_without_the_data(tmp_path, name):
    with pytest.raises(Unavailable) as error:
        datasets.load_rows(name, "test", tmp_path)
    message = str(error.value)
    repository = texts.REPOSITORIES[name]
    start = f"The data set {repository} is not on this machine and the hub does not give it: "
    assert message.startswith(start)
    assert "offline" in message
    assert message.endswith(
        f"or a clone of it as {repository}, under --data-dir (COMPRESS_DATA_DIR), or name a text file instead."
    )
    assert "\n" not in message


def test_stdlib_reads_the_running_python(tmp_path, monkeypatch):
    paths = {"a.py": "test", "b.py": "train", "test/c.py": "train", "lib/d.py": "train", "notes.txt": "train"}
    for path in paths:
        write(tmp_path / path, f"# {path}\n")
    monkeypatch.setattr(texts, "library_root", lambda: tmp_path)
    monkeypatch.setattr(texts, "split_of", lambda path: paths[path])
    assert datasets.load_rows("stdlib", "train", None) == ["# b.py\n", "# lib/d.py\n"]
    assert datasets.load_rows("stdlib", "test", None) == ["# a.py\n"]


def test_damaged_plain_files(tmp_path):
    file = write(tmp_path / "wikitext-2" / "wiki.test.raw", b"\xff\xfe")
    with pytest.raises(Unavailable, match="cannot be read: 'utf-8' codec") as error:
        texts.wikitext2("test", tmp_path)
    assert str(error.value).startswith(str(file))
    file = write(tmp_path / "c4" / "c4-train.json.gz", b"no gzip")
    with pytest.raises(Unavailable, match=r"cannot be read: .*gzip.*\. Replace the file\.$") as error:
        texts.c4("train", tmp_path)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)
