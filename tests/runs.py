"""Runs of the pipeline without its proof, which takes seconds, or with it in this process; what they have written."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import transformers.dynamic_module_utils
from safetensors.torch import load_file
from torch import Tensor

from compress import pipeline
from compress.checkpoints import reload, verify


@contextmanager
def unproved() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "verify", lambda *_arguments, **_options: 0.0)
        yield


def run_here(folder: Path, probe: Path, memory: int, scratch: Path, gguf_file: Path | None = None) -> dict[str, Any]:
    more = [] if gguf_file is None else [str(gguf_file)]
    found: dict[str, Any] = json.loads(json.dumps(reload.main(str(folder), str(probe), memory, str(scratch), *more)))
    return found


@contextmanager
def proved_here(modules: Path) -> Iterator[None]:
    """modules: where transformers is to keep the code that checkpoints carry."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "run_clean", run_here)
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
        patch.syspath_prepend(str(modules))
        yield


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
