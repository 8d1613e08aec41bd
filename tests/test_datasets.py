"""The texts: where their rows come from, their row conventions, and what a user reads when one is missing.

Nothing here uses a network: the hub is either offline by its client's own switch or a stand-in that notes the request.
"""

import gzip
import hashlib
import json
import pkgutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets as hub_datasets
import pytest
from datasets import Dataset

from compress import datasets
from compress.datasets import _hub, alpaca, c4, ptb, stdlib, wikitext2
from compress.errors import Unavailable, UsageError

DEVELOPMENT_DATA = Path(__file__).parents[2] / "shared" / "data"
HUB_SETS = ("alpaca", "c4", "ptb", "wikitext2")


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

    monkeypatch.setattr(_hub, "probe", lambda repository: None)
    monkeypatch.setattr(hub_datasets, "load_dataset", load_dataset)
    return hub


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_parquet(path: Path, columns: dict[str, list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(columns).to_parquet(path)


def json_lines(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text, "url": "u"}) + "\n" for text in texts)


# Names


def test_a_data_set_is_a_module_that_loads():
    assert datasets.names() == ["alpaca", "c4", "ptb", "stdlib", "wikitext2"]


def test_only_windows_needs_torch():
    modules = [m.name for m in pkgutil.iter_modules(datasets.__path__) if m.name != datasets.WINDOWS]
    imports = "; ".join(f"import compress.datasets.{name}" for name in modules)
    heavy = "{'torch', 'transformers', 'datasets', 'huggingface_hub'}"
    program = f"import sys; {imports}; compress.datasets.names(); print(sorted({heavy} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout == "[]\n"


def test_unknown_name():
    with pytest.raises(UsageError) as error:
        datasets.load_rows("wikitex", "test", None)
    assert str(error.value) == (
        "Unknown data set 'wikitex'. Did you mean 'wikitext2'? Available: alpaca, c4, ptb, stdlib, wikitext2. "
        "A .txt or .jsonl file works too."
    )


# Text files


def test_plain_text_is_one_row_as_it_is(tmp_path):
    file = write(tmp_path / "a.txt", "\ufeffone\r\n\r\ntwo\u2028three\n")
    assert datasets.load_rows(str(file), "test", None) == ["one\r\n\r\ntwo\u2028three\n"]


def test_any_file_in_a_folder_is_text(tmp_path):
    assert datasets.load_rows(str(write(tmp_path / "README.md", "# Title")), "train", None) == ["# Title"]


def test_a_file_in_the_working_folder(tmp_path, monkeypatch):
    write(tmp_path / "a.TXT", "text")
    monkeypatch.chdir(tmp_path)
    assert datasets.load_rows("a.TXT", "train", None) == ["text"]


def test_home_is_expanded(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", "text")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert datasets.load_rows("~/a.txt", "train", None) == ["text"]


def test_json_lines_give_a_row_each(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"text": "one\\n"}\n\n{"id": 2, "text": "t\u2028wo"}')
    assert datasets.load_rows(str(file), "train", None) == ["one\n", "t\u2028wo"]


def test_missing_file(tmp_path):
    with pytest.raises(UsageError) as error:
        datasets.load_rows("data/my.txt", "train", None)
    assert str(error.value) == (
        "There is no text file 'data/my.txt'. Correct the path or name one of: alpaca, c4, ptb, stdlib, wikitext2."
    )


@pytest.mark.parametrize(("name", "content"), [("a.txt", ""), ("a.txt", " \n\n"), ("a.jsonl", '{"text": " "}\n')])
def test_empty_file(tmp_path, name, content):
    file = write(tmp_path / name, content)
    with pytest.raises(UsageError) as error:
        datasets.load_rows(str(file), "train", None)
    assert str(error.value) == f"The text {str(file)!r} is empty. Name another one."


def test_undecodable_file(tmp_path):
    file = write(tmp_path / "a.txt", b"caf\xe9 au lait")
    with pytest.raises(UsageError) as error:
        datasets.load_rows(str(file), "train", None)
    assert str(error.value) == f"{str(file)!r} is not UTF-8 text: byte 0xe9 at offset 3. Convert it to UTF-8."


def test_unreadable_file(tmp_path, monkeypatch):
    file = write(tmp_path / "a.txt", "text")

    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(UsageError) as error:
        datasets.load_rows(str(file), "train", None)
    assert str(error.value) == f"{str(file)!r} cannot be read: Permission denied."


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"text": ', "is not JSON: Expecting value."),
        ('{"content": "a"}', "has no string 'text'."),
        ('{"text": 3}', "has no string 'text'."),
        ('["text"]', "has no string 'text'."),
    ],
)
def test_bad_json_line(tmp_path, line, fault):
    file = write(tmp_path / "a.jsonl", '{"text": "fine"}\n\n' + line)
    with pytest.raises(UsageError) as error:
        datasets.load_rows(str(file), "train", None)
    assert str(error.value) == f"{str(file)!r}, line 3 {fault} Each line must be an object with a 'text'."


# The folder of local data


def test_data_directory_is_the_option_then_the_variable(tmp_path, monkeypatch):
    monkeypatch.delenv("COMPRESS_DATA_DIR", raising=False)
    assert datasets.data_directory(None) is None
    monkeypatch.setenv("COMPRESS_DATA_DIR", "")
    assert datasets.data_directory(None) is None
    monkeypatch.setenv("COMPRESS_DATA_DIR", str(tmp_path))
    assert datasets.data_directory(None) == tmp_path
    (tmp_path / "other").mkdir()
    assert datasets.data_directory(tmp_path / "other") == tmp_path / "other"


def test_data_directory_must_exist(monkeypatch):
    with pytest.raises(UsageError) as error:
        datasets.data_directory(Path("nowhere"))
    assert str(error.value) == "--data-dir must be a folder, 'nowhere' is none. Create it or correct the path."
    monkeypatch.setenv("COMPRESS_DATA_DIR", "nowhere")
    with pytest.raises(UsageError) as error:
        datasets.data_directory(None)
    assert str(error.value) == "COMPRESS_DATA_DIR must be a folder, 'nowhere' is none. Create it or correct the path."


# Plain files


def test_wikitext2_row_is_a_line_and_a_blank_line_is_empty(tmp_path):
    write(tmp_path / "wikitext-2" / "wiki.valid.raw", " \n = Title = \n \n One\x85two\u2028three . \n")
    assert wikitext2.load("validation", tmp_path) == ["", " = Title = \n", "", " One\x85two\u2028three . \n"]


def test_wikitext2_prefers_the_whole_split(tmp_path):
    write(tmp_path / "wikitext-2" / "wiki.train.first-1MB.raw", "part\n")
    assert wikitext2.load("train", tmp_path) == ["part\n"]
    write(tmp_path / "wikitext-2" / "wiki.train.raw", "whole\n")
    assert wikitext2.load("train", tmp_path) == ["whole\n"]


@pytest.mark.skipif(not DEVELOPMENT_DATA.is_dir(), reason="the development data is not on this machine")
def test_wikitext2_text_of_the_papers():
    rows = datasets.load_rows("wikitext2", "test", DEVELOPMENT_DATA)
    assert len(rows) == 4358
    assert rows[:4] == ["", " = Robert Boulter = \n", "", rows[3]]
    digest = hashlib.sha256(datasets.SEPARATOR.join(rows).encode()).hexdigest()
    assert digest == "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83"


def test_ptb_row_is_a_sentence(tmp_path):
    write(tmp_path / "ptb" / "ptb.valid.txt", " consumers may want \n to move <unk> \n")
    assert ptb.load("validation", tmp_path) == ["consumers may want", "to move <unk>"]


@pytest.mark.parametrize("name", ["c4-train.00000-of-01024.json.gz", "c4-train.0.jsonl"])
def test_c4_reads_the_first_plain_shard(tmp_path, name):
    content = json_lines(["one", "two"]).encode()
    write(tmp_path / "c4" / name, gzip.compress(content) if name.endswith("gz") else content)
    write(tmp_path / "c4" / name.replace(".0", ".9"), b"not read")
    assert c4.load("train", tmp_path) == ["one", "two"]


def test_c4_test_is_the_start_of_validation(tmp_path):
    pages = [f"page {number}" for number in range(c4.TEST_PAGES + 5)]
    write(tmp_path / "c4" / "c4-validation.jsonl", json_lines(pages))
    assert c4.load("validation", tmp_path) == pages
    assert c4.load("test", tmp_path) == pages[: c4.TEST_PAGES]


def test_alpaca_is_split_as_in_the_reference(tmp_path):
    texts = [f"instruction {number}" for number in range(50)]
    write(tmp_path / "alpaca" / "alpaca.json", json.dumps([{"text": text, "input": ""} for text in texts]))
    outer = Dataset.from_dict({"text": texts}).train_test_split(test_size=0.2, seed=42)
    held_out = outer["test"].train_test_split(test_size=0.5, seed=42)
    assert alpaca.load("train", tmp_path) == list(outer["train"]["text"])
    assert alpaca.load("test", tmp_path) == list(held_out["train"]["text"])
    assert alpaca.load("validation", tmp_path) == list(held_out["test"]["text"])
    splits = [alpaca.load(split, tmp_path) for split in ("train", "validation", "test")]
    assert [len(split) for split in splits] == [40, 5, 5]
    assert sorted(text for split in splits for text in split) == sorted(texts)


def test_damaged_plain_files(tmp_path):
    file = write(tmp_path / "wikitext-2" / "wiki.test.raw", b"\xff\xfe")
    with pytest.raises(Unavailable, match="cannot be read: 'utf-8' codec") as error:
        wikitext2.load("test", tmp_path)
    assert str(error.value).startswith(str(file))
    file = write(tmp_path / "c4" / "c4-train.json.gz", b"no gzip")
    with pytest.raises(Unavailable, match=r"cannot be read: .*gzip.*\. Replace the file\.$") as error:
        c4.load("train", tmp_path)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


def test_plain_records_without_text(tmp_path):
    write(tmp_path / "c4" / "c4-train.jsonl", '{"content": "a"}\n')
    with pytest.raises(Unavailable, match=r"cannot be used: .*text.*Each of its records must have a text 'text'\.$"):
        c4.load("train", tmp_path)
    write(tmp_path / "c4" / "c4-validation.jsonl", '{"text": 3}\n')
    with pytest.raises(Unavailable) as error:
        c4.load("validation", tmp_path)
    assert str(error.value) == (
        "The data set cannot be used: 'text' is not text. Each of its records must have a text 'text'."
    )


def test_alpaca_with_too_few_records(tmp_path):
    write(tmp_path / "alpaca" / "a.jsonl", json_lines(["one"]))
    with pytest.raises(Unavailable, match=r"alpaca cannot be split: .*Give it at least ten records\.$"):
        alpaca.load("train", tmp_path)


# Clones of hub repositories


def test_wikitext2_clone(tmp_path):
    clone = tmp_path / "Salesforce" / "wikitext"
    for config in ("wikitext-2-raw-v1", "wikitext-103-raw-v1"):
        for split in ("train", "validation", "test"):
            rows = ["", f" = {config} {split} = \n"]
            write_parquet(clone / config / f"{split}-00000-of-00001.parquet", {"text": rows})
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(f"  - split: {s}\n    path: {config}/{s}-*\n" for s in ("train", "validation", "test"))
        for config in ("wikitext-103-raw-v1", "wikitext-2-raw-v1")
    )
    write(clone / "README.md", card + "---\n")
    assert wikitext2.load("test", tmp_path) == ["", " = wikitext-2-raw-v1 test = \n"]


def test_c4_clone(tmp_path):
    shard = tmp_path / "allenai" / "c4" / c4.SHARD["validation"]
    write(shard, gzip.compress(json_lines(["one", "two"]).encode()))
    assert c4.load("validation", tmp_path) == ["one", "two"]


def test_ptb_clone(tmp_path):
    for split in ("train", "validation", "test"):
        file = tmp_path / ptb.REPOSITORY / "penn_treebank" / split / "0000.parquet"
        write_parquet(file, {"sentence": [f"a {split} sentence"]})
    assert ptb.load("test", tmp_path) == ["a test sentence"]


def test_alpaca_clone(tmp_path):
    texts = [f"instruction {number}" for number in range(10)]
    write_parquet(tmp_path / alpaca.REPOSITORY / "data" / "train-00000-of-00001-a.parquet", {"text": texts})
    assert len(alpaca.load("train", tmp_path)) == 8


def test_plain_files_come_before_a_clone(tmp_path):
    write(tmp_path / "ptb" / "ptb.test.txt", "plain\n")
    write_parquet(tmp_path / ptb.REPOSITORY / "penn_treebank" / "test" / "0000.parquet", {"sentence": ["clone"]})
    assert ptb.load("test", tmp_path) == ["plain"]


def test_a_clone_of_a_script_is_refused(tmp_path):
    clone = tmp_path / ptb.REPOSITORY
    write(clone / "ptb_text_only.py", "")
    with pytest.raises(Unavailable) as error:
        ptb.load("test", tmp_path)
    assert str(error.value) == (
        f"The clone {clone} cannot be read: Dataset scripts are no longer supported, but found ptb_text_only.py. "
        "Clone it again, or name a text file instead."
    )


# The hub


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


def test_a_cached_data_set_needs_no_hub(hub, own_cache, monkeypatch):
    monkeypatch.setattr(_hub, "probe", lambda repository: pytest.fail("asked the hub"))
    (own_cache / "Salesforce___wikitext").mkdir()
    hub.table = Dataset.from_dict({"text": ["cached\n"]})
    assert wikitext2.load("test") == ["cached\n"]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", HUB_SETS)
def test_offline_without_the_data(tmp_path, name):
    with pytest.raises(Unavailable) as error:
        datasets.load_rows(name, "test", tmp_path)
    message = str(error.value)
    module = {"alpaca": alpaca, "c4": c4, "ptb": ptb, "wikitext2": wikitext2}[name]
    start = f"The data set {module.REPOSITORY} is not on this machine and the hub does not give it: "
    assert message.startswith(start)
    assert "offline" in message
    assert message.endswith(
        f"or a clone of it as {module.REPOSITORY}, under --data-dir (COMPRESS_DATA_DIR), or name a text file instead."
    )
    assert "\n" not in message


def test_unreachable_hub(monkeypatch):
    def unreachable(repository):
        raise ConnectionError("[Errno -2] Name or service not known\nmore")

    monkeypatch.setattr(_hub, "probe", unreachable)
    with pytest.raises(Unavailable) as error:
        wikitext2.load("test")
    assert str(error.value) == (
        "The data set Salesforce/wikitext is not on this machine and the hub does not give it: "
        "[Errno -2] Name or service not known. Put wikitext-2/wiki.test.raw, or a clone of it as Salesforce/wikitext, "
        "under --data-dir (COMPRESS_DATA_DIR), or name a text file instead."
    )


def test_without_the_datasets_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets.exceptions", None)
    with pytest.raises(Unavailable, match=r"the package 'datasets\.exceptions' is missing\. Install it with pip\.$"):
        wikitext2.load("test")


# The standard library


def test_stdlib_reads_the_running_python(tmp_path, monkeypatch):
    paths = {"a.py": "test", "b.py": "train", "test/c.py": "train", "lib/d.py": "train", "notes.txt": "train"}
    for path in paths:
        write(tmp_path / path, f"# {path}\n")
    monkeypatch.setattr(stdlib, "library_root", lambda: tmp_path)
    monkeypatch.setattr(stdlib, "split_of", lambda path: paths[path])
    assert datasets.load_rows("stdlib", "train", None) == ["# b.py\n", "# lib/d.py\n"]
    assert datasets.load_rows("stdlib", "test", None) == ["# a.py\n"]


def test_stdlib_splits_by_path():
    paths = [f"package/module{number}.py" for number in range(1600)]
    counts = Counter(stdlib.split_of(path) for path in paths)
    assert set(counts) == set(stdlib.SPLITS)
    assert counts["train"] == pytest.approx(1400, rel=0.05)
    assert stdlib.split_of("json/decoder.py") == "train"


def test_stdlib_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(stdlib, "library_root", lambda: tmp_path)
    with pytest.raises(Unavailable) as error:
        stdlib.load("test")
    assert str(error.value) == (f"The standard library has no source files under {tmp_path}. Name a text file instead.")
