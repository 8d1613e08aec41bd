"""Freed memory goes back to the system, in a process of its own: what is set stays set."""

import subprocess
import sys

import pytest

from compress import pipeline

# Blocks below the largest of glibc's thresholds, with something kept behind each: freed, they leave gaps in the heap.
SCRIPT = """
import ctypes, sys
from compress.streaming.memory import return_large_blocks

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def held():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon:")) * 1024

def written(size):
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    return block

if "told" in sys.argv:
    return_large_blocks()
libc.free(written(30 * 2**20))  # glibc takes this for the size of what comes and goes
before = held()
blocks = [(written(8 * 2**20), written(2**18)) for _ in range(10)]
for block, _ in blocks:
    libc.free(block)
print(held() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux and its C library")
@pytest.mark.parametrize(("words", "kept"), [(["told"], False), ([], True)], ids=["told", "untold"])
def test_gaps_between_blocks_are_not_kept(words, kept):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, check=True, env={"PATH": ""}
    )
    assert (int(done.stdout) > 60 * 2**20) is kept


def test_a_run_asks_for_it_before_anything_else(monkeypatch):
    said: list[str] = []

    class Prepared(Exception):
        pass

    def prepare(*_arguments: object) -> None:
        said.append("prepare")
        raise Prepared

    monkeypatch.setattr(pipeline, "return_large_blocks", lambda: said.append("return large blocks"))
    monkeypatch.setattr(pipeline, "prepare", prepare)
    with pytest.raises(Prepared):
        pipeline.run(None)
    assert said == ["return large blocks", "prepare"]
