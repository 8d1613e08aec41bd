"""Free memory goes back to the system, in a process of its own; and who asks for it."""

import subprocess
import sys
from pathlib import Path

import pytest

import compress
import oracles
import tiny
from compress.calibration import branch_pass
from compress.calibration import walk as walk_module

# Blocks below the largest of glibc's thresholds, with something kept behind each: freed, they leave gaps in the heap.
SCRIPT = """
import ctypes
from compress.progress import return_free_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def held():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon:")) * 1024

def written(size):
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    return block

libc.free(written(30 * 2**20))  # glibc takes this for the size of what comes and goes
before = held()
blocks = [(written(8 * 2**20), written(2**18)) for _ in range(10)]
for block, _ in blocks:
    libc.free(block)
gaps = held() - before
return_free_memory()
print(gaps, held() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux and its C library")
def test_gaps_between_blocks_are_given_back():
    environment = {"PYTHONPATH": str(Path(compress.__file__).parents[1])}  # and nothing that tunes malloc
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=environment)
    gaps, left = map(int, done.stdout.split())
    assert gaps > 60 * 2**20
    assert left < 20 * 2**20


def test_a_walk_gives_memory_back_behind_every_branch_and_part(monkeypatch, tmp_path):
    tiny.tiny_model("llama").save_pretrained(tmp_path)
    walk, returned = oracles.new_walk(tmp_path, oracles.fold_only(), oracles.random_ids(2, 8)), list[int]()
    for module in (walk_module, branch_pass):
        monkeypatch.setattr(module, "return_free_memory", lambda: returned.append(walk.next_part))
    for _ in walk.parts():
        pass
    ends = list(range(1, walk.num_parts + 1))
    # Behind the embeddings; before and behind each run of a block's attention and MLP; before the head.
    inside = [0, *(block for block in ends[:-2] for _ in range(4)), walk.num_parts - 1]
    assert sorted(returned) == sorted(ends + inside)
