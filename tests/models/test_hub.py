"""What a name of a model stands for, and what a user reads when it cannot be had. Nothing here uses a network."""

import shutil
import socket
import time
from pathlib import Path

import pytest

from compress.errors import Unavailable, UsageError
from compress.models import hub
from compress.models.hub import ALIASES, find_model


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """No test finds a model that the user has fetched."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def refused(name: str) -> str:
    with pytest.raises(UsageError) as error:
        find_model(name)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_folder(folder):
    source = find_model(str(folder))
    assert (source.name, source.folder, source.repository) == ("mine", folder, None)
    assert source.config_folder() == source.whole_folder() == folder
    shutil.copytree(folder, folder.parent / "opt-125m")  # before an alias and an id of the hub
    assert find_model(f"{folder.parent}/opt-125m").repository is None


@pytest.mark.parametrize("alias", ["opt-125m", "llama-2-7b", "qwen2.5-0.5b", "phi-2"])
def test_an_alias(alias):
    source = find_model(alias)
    assert (source.name, source.folder, source.repository) == (alias, None, ALIASES[alias])
    assert find_model(alias.upper()) == source


@pytest.mark.parametrize(
    ("typed", "meant"), [("opt-126m", "opt-125m"), ("lama-2-7b", "llama-2-7b"), ("dmo", "demo"), ("phi2", "phi-2")]
)
def test_an_unknown_name_with_a_guess(typed, meant):
    message = refused(typed)
    assert f"Unknown model {typed!r}. Did you mean {meant!r}?" in message
    assert "owner/name" in message


@pytest.mark.parametrize(
    "typed", ["./nowhere", "../nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c", "/nowhere"]
)
def test_what_looks_like_a_path_is_never_asked_of_the_hub(typed):
    message = refused(typed)
    assert repr(typed) in message
    assert "no model folder" in message


@pytest.mark.parametrize(
    "typed", ["my models/tiny", "owner/na me", "owner/name?", "a/-b-", "owner/", "owner/..", "o/a:b"]
)
def test_what_no_hub_id_can_be(typed):
    """huggingface_hub raises a ValueError of its own for these, late; a user reads that there is no such folder."""
    with pytest.raises((UsageError, Unavailable)) as error:
        find_model(typed).config_folder()
    assert repr(typed) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unreachable_hub_is_told_soon(monkeypatch):
    """A port that nobody listens on: refused at once, and not tried for minutes."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr("huggingface_hub._snapshot_download.HfApi", local_api(port))
    start = time.perf_counter()
    with pytest.raises(Unavailable, match="cannot be reached"):
        find_model("owner/name").whole_folder()
    assert time.perf_counter() - start < 20


def local_api(port: int):
    from huggingface_hub import HfApi

    def api(*_arguments, **options):
        return HfApi(**(options | {"endpoint": f"http://127.0.0.1:{port}"}))

    return api


@pytest.mark.parametrize(
    ("error_name", "words"), [("GatedRepoError", "accept its license"), ("RepositoryNotFoundError", "has no model")]
)
def test_what_the_hub_answers(monkeypatch, error_name, words):
    from huggingface_hub import errors

    # These want an HTTP response; none is made here.
    kind = getattr(errors, error_name)
    answer = kind.__new__(kind)

    def download(*_arguments, **_options):
        raise answer

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(Unavailable, match=words) as error:
        find_model("owner/name").whole_folder()
    assert "owner/name" in str(error.value)


def test_only_safe_files_are_fetched(monkeypatch, tmp_path):
    """Never a pickle; for a plan, config.json alone."""
    asked = []

    def download(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    source = find_model("phi-2")
    assert source.config_folder() == source.whole_folder() == Path(tmp_path)
    assert asked == [("microsoft/phi-2", ["config.json"]), ("microsoft/phi-2", list(hub.NEEDED_FILES))]
    from fnmatch import fnmatch

    def fetched(name):
        return any(fnmatch(name, pattern) for pattern in hub.NEEDED_FILES)

    assert all(map(fetched, ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model"]))
    assert not any(map(fetched, ["pytorch_model.bin", "modeling_evil.py", "model.pt", "model.ckpt", "run.sh"]))
