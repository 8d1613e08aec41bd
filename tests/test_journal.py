"""The journal of finished parts: what a crash, a torn write or a damaged file makes of it."""

import errno
import json
import os
import shutil

import pytest
import torch

from compress.errors import OutputError, UsageError
from compress.streaming import journal as module
from compress.streaming.journal import JOURNAL, LOCK, Journal, take_lock, write_tensors

IDENTITY = {"recipe": {"ratio": 0.25, "stages": ["rotate", "slice"]}, "model": "5ac1", "batch size": None}


def finish_part(journal: Journal, number: int) -> None:
    """A part and a state with numbers of their own."""
    written = write_tensors(journal.folder / f"model-{number}.safetensors", {"weight": torch.full((4,), float(number))})
    journal.record({"name": f"part {number}", "part": written}, {"stream": torch.full((2, 3), float(number))})


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out.partial"


@pytest.fixture
def three_parts(folder):
    """A folder in which three parts were finished; its run is over."""
    journal = Journal.start(folder, IDENTITY)
    for number in range(3):
        finish_part(journal, number)
    journal.close()
    return folder


def resumed(folder, identity=IDENTITY) -> tuple[list[str], dict[str, torch.Tensor] | None]:
    """The names of the parts that count, and the state after them."""
    journal = Journal.resume(folder, identity)
    names = [entry["name"] for entry in journal.entries]
    state = journal.state() if names else None
    journal.close()
    return names, state


def test_resume_gives_the_parts_and_the_last_state(three_parts):
    names, state = resumed(three_parts)
    assert names == ["part 0", "part 1", "part 2"]
    assert state is not None
    assert torch.equal(state["stream"], torch.full((2, 3), 2.0))


def test_the_identity_is_the_first_line(three_parts):
    first = (three_parts / JOURNAL).read_text().splitlines()[0]
    assert json.loads(first)["run"] == IDENTITY


def test_only_the_last_state_is_kept(three_parts):
    assert [path.name for path in three_parts.glob("state-*")] == ["state-00002.safetensors"]


def test_a_resumed_journal_goes_on(three_parts):
    journal = Journal.resume(three_parts, IDENTITY)
    finish_part(journal, 3)
    journal.close()
    names, state = resumed(three_parts)
    assert names == [f"part {number}" for number in range(4)]
    assert state is not None
    assert state["stream"][0, 0] == 3


def test_forget_leaves_only_the_parts_and_the_lock(three_parts):
    journal = Journal.resume(three_parts, IDENTITY)
    (three_parts / "state-00000.safetensors").write_bytes(b"left by a kill")
    journal.forget()
    journal.close()
    parts = [f"model-{number}.safetensors" for number in range(3)]
    assert sorted(path.name for path in three_parts.iterdir()) == [LOCK, *parts]


@pytest.mark.parametrize("kept", [1, 30, -1])
def test_a_torn_last_line_did_not_happen(three_parts, kept):
    """The state of the part before it is gone by then, except where the kill came before its deletion."""
    journal_file = three_parts / JOURNAL
    *whole, last = journal_file.read_text().splitlines(keepends=True)
    journal_file.write_text("".join(whole) + last[:-1][:kept])
    entry = json.loads(whole[-1])["state"]
    without = shutil.copytree(three_parts, three_parts.with_name("without"))
    assert resumed(without)[0] == []
    remade = write_tensors(three_parts / entry["file"], {"stream": torch.full((2, 3), 1.0)})
    assert remade["sha256"] == entry["sha256"]
    names, state = resumed(three_parts)
    assert names == ["part 0", "part 1"]
    assert state is not None
    assert state["stream"][0, 0] == 1


def test_a_resume_mends_the_file(three_parts):
    """What comes after a torn line would otherwise be lost at the next resume."""
    journal_file = three_parts / JOURNAL
    whole = journal_file.read_text()
    journal_file.write_text(whole + '{"name": "par')
    resumed(three_parts)
    assert journal_file.read_text() == whole


@pytest.mark.parametrize("line", ["[1, 2]", "null", '{"name": "part 3"}', '{"name": "part 3", "part": 7}', "\x00" * 64])
def test_a_line_that_is_no_entry_ends_the_journal(three_parts, line):
    with (three_parts / JOURNAL).open("a") as file:
        file.write(line + "\n")
    assert resumed(three_parts)[0] == ["part 0", "part 1", "part 2"]


@pytest.mark.parametrize("number", range(3))
def test_a_part_with_a_flipped_byte_does_not_count(three_parts, number):
    """Nor does what came after it; and the state before it is no longer there, so the run starts over."""
    file = three_parts / f"model-{number}.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert resumed(three_parts) == ([], None)


def test_a_lost_state_starts_over(three_parts):
    (three_parts / "state-00002.safetensors").unlink()
    assert resumed(three_parts) == ([], None)


@pytest.mark.parametrize("name", ["../model-0.safetensors", "/etc/hostname", "sub/model-0.safetensors", "", None])
def test_a_journal_names_files_of_its_own_folder_only(three_parts, name):
    first, *entries = (three_parts / JOURNAL).read_text().splitlines()
    entry = json.loads(entries[0])
    if name:
        (three_parts / "sub").mkdir()
        (three_parts / "sub" / "model-0.safetensors").write_bytes((three_parts / "model-0.safetensors").read_bytes())
        (three_parts.parent / "model-0.safetensors").write_bytes((three_parts / "model-0.safetensors").read_bytes())
    entry["part"]["file"] = name
    (three_parts / JOURNAL).write_text("\n".join([first, json.dumps(entry), *entries[1:]]) + "\n")
    assert resumed(three_parts) == ([], None)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "0000"}, ["model"]),
        ({"batch size": 4}, ["batch size"]),
        ({"recipe": {"ratio": 0.5}, "model": "0000"}, ["model", "recipe"]),
        ({"device": "cuda"}, ["device"]),
    ],
)
def test_another_run_is_refused_and_told_in_what_it_differs(three_parts, changes, named):
    with pytest.raises(UsageError) as error:
        Journal.resume(three_parts, IDENTITY | changes)
    assert f"had another {', '.join(named)}." in str(error.value)
    assert "--overwrite" in str(error.value)
    assert resumed(three_parts)[0] == ["part 0", "part 1", "part 2"]


@pytest.mark.parametrize("content", [None, "", '{"run": {"rec', "not JSON\n", '{"name": "part 0"}\n'])
def test_a_journal_without_its_first_line_is_refused(three_parts, content):
    (three_parts / JOURNAL).unlink()
    if content is not None:
        (three_parts / JOURNAL).write_text(content)
    with pytest.raises(UsageError, match=r"no readable journal.*--overwrite"):
        Journal.resume(three_parts, IDENTITY)


def test_two_journals_cannot_share_a_folder(folder):
    journal = Journal.start(folder, IDENTITY)
    finish_part(journal, 0)
    for opening in (Journal.start, Journal.resume):
        with pytest.raises(UsageError, match=r"Another run is writing .*out\.partial"):
            opening(folder, IDENTITY)
    finish_part(journal, 1)
    journal.close()
    assert resumed(folder)[0] == ["part 0", "part 1"]


def test_a_closed_journal_lets_go_of_its_lock(three_parts):
    take_lock(three_parts).close()
    take_lock(three_parts).close()


def test_a_refused_resume_lets_go_of_its_lock(three_parts):
    with pytest.raises(UsageError) as error:
        Journal.resume(three_parts, IDENTITY | {"model": "0000"})
    # The error, and with it the frame, is still alive: the lock must have been closed, not collected.
    lock = take_lock(three_parts)
    lock.close()
    assert error.value is not None


def test_written_tensors_are_described_as_they_lie_there(tmp_path):
    import hashlib

    file = tmp_path / "part.safetensors"
    written = write_tensors(file, {"weight": torch.arange(6.0)})
    content = file.read_bytes()
    assert written == {"file": file.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("step", ["save_file", "fsync", "replace"])
def test_what_cannot_be_written_is_not_there(tmp_path, monkeypatch, step):
    """A disk that fills: the old file stays as it was, nothing unfinished is left, and the error says what to do."""
    file = tmp_path / "part.safetensors"
    write_tensors(file, {"weight": torch.zeros(3)})
    before = file.read_bytes()

    def full(*_arguments, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner = {"save_file": (module, "save_file"), "fsync": (os, "fsync"), "replace": (type(file), "replace")}[step]
    monkeypatch.setattr(*owner, full)
    with pytest.raises(OutputError, match=r"part\.safetensors cannot be written .*No space left.*--resume"):
        write_tensors(file, {"weight": torch.ones(3)})
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.read_bytes() == before
