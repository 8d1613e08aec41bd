"""A checkpoint of every kind that this program writes, made from tiny models in a second or two."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from cli_runner import succeeds
from compress.io import exclusive
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
    "merged": ("llama", [*SLIM, "--adapter-rank", 4, "--materialize"]),
}


def write_outputs(root: Path, *kinds: str) -> None:
    """Folders `root / kind`, from models `root / model`; nothing is reloaded in a process of its own."""
    write_text(root / "text.txt", lines=60)
    for model in {KINDS[kind][0] for kind in kinds}:
        write_model(root / model, model, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        patch.setattr("compress.pipeline.verify", lambda *_arguments, **_options: 0.0)
        patch.chdir(root)
        for kind in kinds:
            model, command = KINDS[kind]
            text = ["--calib", "text.txt", "--samples", 8, "--seq-len", 32]
            succeeds(*command, "--model", model, *text, "--out", kind)


def shared_outputs(factory: pytest.TempPathFactory, *kinds: str) -> Path:
    """A folder with copies of outputs and of their models, each made once for all test files of a run."""
    base = factory.getbasetemp()
    store = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "outputs"
    store.mkdir(exist_ok=True)
    with exclusive(store.parent):
        write_outputs(store, *[kind for kind in kinds if not (store / kind).exists()])
    root = factory.mktemp("outputs") / "outputs"
    shutil.copytree(store, root, ignore=lambda _folder, names: set(names) & (KINDS.keys() - set(kinds)))
    return root
