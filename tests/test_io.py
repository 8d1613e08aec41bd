"""Files that are whole or not there, one process at a time, and child processes that end with their parent."""

import errno
import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from compress import io
from compress.errors import OutputError
from compress.io import WrittenFile, atomic_write, exclusive, fsync, write_tensors
from compress.process import run_in_child


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    return file


def write_half(file: Path, error: BaseException) -> None:
    with atomic_write(file) as unfinished:
        unfinished.write_text("half")
        raise error


@pytest.mark.parametrize("error", [OSError(28, "full"), KeyboardInterrupt()])
def test_nothing_has_changed_when_the_block_fails(file, error):
    with pytest.raises(type(error)):
        write_half(file, error)
    assert file.read_text() == "old"
    assert list(file.parent.iterdir()) == [file]


def test_the_file_is_on_the_disk_before_it_has_its_name_and_the_name_after(file, monkeypatch):
    told = []
    flush, replace = os.fsync, Path.replace

    def flushes(number: int) -> None:
        told.append(str(Path(f"/proc/self/fd/{number}").readlink()))
        flush(number)

    monkeypatch.setattr(os, "fsync", flushes)
    monkeypatch.setattr(Path, "replace", lambda self, target: (told.append("rename"), replace(self, target)))
    with atomic_write(file) as unfinished:
        unfinished.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert told == [str(unfinished), "rename", str(file.parent)]


@pytest.mark.parametrize("step", ["save_file", "fsync"])
def test_what_cannot_be_written_is_not_there(tmp_path, monkeypatch, step):
    """A disk that fills: the old file stays as it was, nothing unfinished is left, and the error says what to do."""
    file = tmp_path / "part.safetensors"
    written = write_tensors(file, {"weight": torch.zeros(3)})
    before = file.read_bytes()
    assert written == WrittenFile(file=file.name, bytes=len(before), sha256=hashlib.sha256(before).hexdigest())

    def full(*_arguments, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner = {"save_file": (io, "save_file"), "fsync": (os, "fsync"), "replace": (Path, "replace")}[step]
    monkeypatch.setattr(*owner, full)
    with pytest.raises(OutputError, match=r"part\.safetensors cannot be written .*No space left.*--resume"):
        write_tensors(file, {"weight": torch.ones(3)})
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_bytes() == before


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_file_system_that_cannot_flush_folders(file, monkeypatch, number):
    """But one that fails is told, and so is a file that cannot be flushed for whatever reason."""

    def fails(_descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    if number == errno.EINVAL:
        fsync(file.parent)
    else:
        with pytest.raises(OSError, match="Input/output error"):
            fsync(file.parent)
    with pytest.raises(OSError, match=os.strerror(number)):
        fsync(file)


def test_one_at_a_time(tmp_path):
    told = []

    def second() -> None:
        with exclusive(tmp_path):
            told.append("second")

    with exclusive(tmp_path):
        waiting = threading.Thread(target=second)
        waiting.start()
        time.sleep(0.1)
        told.append("first")
    waiting.join()
    assert told == ["first", "second"]


SAYS = "import os, sys; print(sys.argv[1:], os.environ['MINE'], 'compress' in sys.modules); raise ValueError('its own')"
STARTS = "import sys; from compress.process import run_in_child as run; run('-I', sys.argv[1], sys.argv[2:], {})"
SLEEPS = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(100)"


def test_a_script_in_a_child_process(tmp_path):
    (tmp_path / "script.py").write_text(SAYS)
    done = run_in_child("-I", str(tmp_path / "script.py"), ["a", "b"], {"MINE": "x"})
    assert (done.returncode, done.stdout.strip()) == (1, "['a', 'b'] x False")
    assert done.stderr.strip().splitlines()[-1] == "ValueError: its own"


def test_it_ends_with_its_parent(tmp_path):
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
