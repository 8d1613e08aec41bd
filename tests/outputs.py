"""A checkpoint of every kind that this program writes, made once by whichever test process first asks for it."""

import fcntl
import functools
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from cli_runner import succeeds
from tiny import write_model, write_text

SLIM = ["slim", "--fast", "--bits", 4, "--sparsity", "2:4", "--group", 16]
# By what the test files call them: the model, and the command without its calibration text.
KINDS: dict[str, tuple[str, list[object]]] = {
    "sliced": ("llama", ["slice", "--ratio", 0.25, "--measure-error"]),
    "turned": ("opt", ["slice", "--method", "slicegpt", "--ratio", 0.25]),
    "thin": ("llama", ["lord", "--rank-frac", 0.5]),
    "multiplied": ("llama", ["lord", "--rank-frac", 0.5, "--materialize"]),
    "packed": ("llama", [*SLIM, "--adapter-rank", 4]),
    "compact": ("llama", [*SLIM, "--adapter-rank", 4, "--compact"]),
    "bytes": ("llama", ["slim", "--fast", "--bits", "fp8", "--sparsity", "none", "--adapter-rank", 0]),
    "odd": ("llama", ["slim", "--fast", "--bits", 3, "--sparsity", "50%", "--adapter-rank", 0, "--asymmetric"]),
}


# A folder that all processes of a test run share, set by conftest.py.
STORE = "COMPRESS_TESTS_STORE"


def write_outputs(root: Path, *kinds: str) -> None:
    """Folders `root / kind`, from models `root / model`; nothing is reloaded in a process of its own."""
    for kind in kinds:
        shutil.copytree(stored(kind), root, dirs_exist_ok=True)


@functools.cache
def store() -> Path:
    """Of this process alone outside of a test run."""
    return Path(os.environ.get(STORE) or tempfile.mkdtemp())


def stored(kind: str) -> Path:
    place = store() / kind
    place.parent.mkdir(exist_ok=True)
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            unfinished = place.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            write(unfinished, kind)
            unfinished.rename(place)
    return place


def write(root: Path, kind: str) -> None:
    model, command = KINDS[kind]
    write_text(root / "text.txt", lines=60)
    write_model(root / model, model, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        patch.setattr("compress.pipeline.verify", lambda *_arguments, **_options: 0.0)
        patch.chdir(root)
        text = ["--calib", "text.txt", "--samples", 8, "--seq-len", 32]
        succeeds(*command, "--model", model, *text, "--out", kind)
