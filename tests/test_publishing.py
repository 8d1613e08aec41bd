"""An output gets its name: killed between any two changes of a name, it is the old one or the new one, whole."""

import json
import os
from pathlib import Path

import pytest

from cli_runner import snapshot
from compress.publishing import aside_of, discard, is_finished, none_left_empty, publish
from compress.streaming.journal import LOCK, take_lock


def make(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "compress.json").write_text(json.dumps(text))
    (folder / "model.safetensors").write_text(text)
    return folder


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def partial(tmp_path):
    folder = make(tmp_path / "out.partial", "new")
    (folder / LOCK).touch()
    return folder


def texts(folder: Path) -> set[str]:
    return {name for name in ("old", "new") for file in folder.glob("*") if name in file.read_text()}


def test_a_new_output(out, partial):
    publish(partial, out)
    assert list(out.parent.iterdir()) == [out]
    assert sorted(snapshot(out)) == ["compress.json", "model.safetensors"]


def test_an_output_is_replaced(out, partial):
    make(out, "old")
    publish(partial, out)
    assert list(out.parent.iterdir()) == [out]
    assert texts(out) == {"new"}


def test_a_link_is_replaced_and_what_it_leads_to_is_not(out, partial):
    elsewhere = make(out.with_name("elsewhere"), "old")
    out.symlink_to(elsewhere)
    publish(partial, out)
    assert sorted(out.parent.iterdir()) == [elsewhere, out]
    assert not out.is_symlink()
    assert texts(elsewhere) == {"old"}
    assert texts(out) == {"new"}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("fatal", range(1, 4))
def test_killed_before_any_rename(out, partial, monkeypatch, fatal):
    """What is left bears a name by which the next run finds it; a folder that is half deleted never looks whole."""
    make(out, "old")
    renames, rename = 0, Path.rename

    def counted(self, target):
        nonlocal renames
        renames += 1
        if renames >= fatal:
            raise Killed
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", counted)
    with pytest.raises(Killed):
        publish(partial, out)
    found = {path.name: texts(path) for path in out.parent.iterdir()}
    if fatal == 1:
        assert found == {"out": {"old"}, "out.partial": {"new"}}
    elif fatal == 2:
        # The name cannot be given back here, for that is a rename too.
        assert found == {"out.replaced": {"old"}, "out.partial": {"new"}}
        assert is_finished(partial)
    else:
        assert found == {"out": {"new"}, "out.replaced": {"old"}}


def test_an_output_that_has_made_way_comes_back_if_the_new_one_does_not_come(out, partial, monkeypatch):
    make(out, "old")
    rename = Path.rename

    def fails(self, target):
        if self == partial:
            raise OSError(30, os.strerror(30))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="Read-only"):
        publish(partial, out)
    assert {path.name: texts(path) for path in out.parent.iterdir()} == {"out": {"old"}, "out.partial": {"new"}}


def test_what_is_half_deleted_is_not_finished(out, monkeypatch):
    folder = make(out, "old")
    monkeypatch.setattr("shutil.rmtree", lambda _folder: None)
    assert is_finished(folder)
    discard(folder)
    assert not is_finished(folder)


def test_an_empty_folder_goes_with_its_lock(tmp_path):
    (tmp_path / "out.partial").mkdir()
    with take_lock(tmp_path / "out.partial") as lock, none_left_empty(tmp_path / "out.partial", lock):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("who", ["something in it", "another one's"])
def test_a_folder_stays(tmp_path, who):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    with take_lock(partial) as lock, none_left_empty(partial, lock):
        if who == "another one's":
            partial.rename(tmp_path / "out")
            partial.mkdir()
            (partial / LOCK).touch()
        else:
            (partial / "journal.jsonl").touch()
    assert partial.is_dir()


def test_where_it_waits():
    assert aside_of(Path("a/out")) == Path("a/out.replaced")
