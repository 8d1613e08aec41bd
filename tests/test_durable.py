"""Files that are whole or not there, names that are given in turn, and processes that do not outlive their parent."""

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from compress.apart import run_apart
from compress.durable import flush, flush_below, in_turn, whole


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    return file


def test_a_file_is_replaced_at_the_end_of_the_block(file):
    with whole(file) as unfinished:
        unfinished.write_text("new")
        assert file.read_text() == "old"
        assert unfinished.parent == file.parent
    assert file.read_text() == "new"
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("error", [OSError(28, "full"), ValueError("x"), KeyboardInterrupt()])
def test_nothing_has_changed_when_the_block_fails(file, error):
    with pytest.raises(type(error)):
        write_half(file, error)
    assert file.read_text() == "old"
    assert list(file.parent.iterdir()) == [file]


def write_half(file: Path, error: BaseException) -> None:
    with whole(file) as unfinished:
        unfinished.write_text("half")
        raise error


def test_the_file_is_on_the_disk_before_it_has_its_name_and_the_name_after(file, monkeypatch):
    told = []
    fsync, replace = os.fsync, Path.replace

    def flushes(number: int) -> None:
        told.append(str(Path(f"/proc/self/fd/{number}").readlink()))
        fsync(number)

    monkeypatch.setattr(os, "fsync", flushes)
    monkeypatch.setattr(Path, "replace", lambda self, target: (told.append("rename"), replace(self, target)))
    with whole(file) as unfinished:
        unfinished.write_text("new")
    assert told == [str(unfinished), "rename", str(file.parent)]


def test_all_below_a_folder_is_flushed(tmp_path, monkeypatch):
    told = []
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file").write_text("x")
    monkeypatch.setattr("compress.durable.flush", told.append)
    flush_below(tmp_path)
    assert told == [tmp_path / "sub", tmp_path / "sub" / "file", tmp_path]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_file_system_may_know_no_flushing_of_folders(file, monkeypatch, number):
    """But one that fails is told, and so is a file that cannot be flushed for whatever reason."""

    def fails(_descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    if number == errno.EINVAL:
        flush(file.parent)
    else:
        with pytest.raises(OSError, match="Input/output error"):
            flush(file.parent)
    with pytest.raises(OSError, match=os.strerror(number)):
        flush(file)


def test_one_at_a_time(tmp_path):
    told = []

    def second() -> None:
        with in_turn(tmp_path):
            told.append("second")

    with in_turn(tmp_path):
        waiting = threading.Thread(target=second)
        waiting.start()
        time.sleep(0.2)
        told.append("first")
    waiting.join()
    assert told == ["first", "second"]


SAYS = "import os, sys; print(sys.argv[1:], os.environ['MINE'], 'compress' in sys.modules); sys.exit(3)"


def test_a_script_apart(tmp_path):
    (tmp_path / "script.py").write_text(SAYS)
    done = run_apart("-I", str(tmp_path / "script.py"), ["a", "b"], {"MINE": "x"})
    assert (done.returncode, done.stdout.strip()) == (3, "['a', 'b'] x False")


def test_a_script_apart_fails_with_its_own_last_line(tmp_path):
    (tmp_path / "script.py").write_text("raise ValueError('its own')")
    done = run_apart("-I", str(tmp_path / "script.py"), [], {})
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "ValueError: its own"


STARTS = "import sys; from compress.apart import run_apart; run_apart('-I', sys.argv[1], sys.argv[2:], {})"
SLEEPS = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(100)"


def test_a_script_apart_ends_with_its_parent(tmp_path):
    (tmp_path / "script.py").write_text(SLEEPS)
    said = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", STARTS, str(tmp_path / "script.py"), str(said)])
    until(lambda: said.exists() and said.read_text() != "")
    child = int(said.read_text())
    parent.kill()
    parent.wait()
    until(lambda: has_ended(child))


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def until(holds) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
