"""Jobs on tiny models, run without the proof, which takes seconds, or with it in this process; what they have made."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.dynamic_module_utils
from safetensors.torch import load_file
from torch import Tensor

import tiny
from compress import pipeline
from compress.checkpoints import reload, verify
from compress.models.hub import find_model
from compress.planning.prepare import Job
from compress.recipe import parse_recipe


def job_of(
    folder: Path,
    model_type: str,
    stages: Sequence[Any],
    *,
    changes: dict[str, Any] | None = None,
    out: str = "out",
    samples: int = 16,
    **recipe: Any,
) -> Job:
    """On a tiny model of one block, which is written with its text the first time. changes: of the model."""
    if not (folder / "dense").exists():
        options = {"dtype": torch.float32, "num_hidden_layers": 1} | (changes or {})
        tiny.write_model(folder / "dense", model_type, **options)
        tiny.write_text(folder / "text.txt", lines=60)
    calibration = {"source": str(folder / "text.txt"), "samples": samples, "seq_len": 16}
    chosen = parse_recipe({"method": "test", "stages": list(stages), "calibration": calibration, **recipe})
    return Job(model=find_model(str(folder / "dense")), recipe=chosen, out=folder / out, command="compress run")


@contextmanager
def unproved() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "verify", lambda *_arguments, **_options: 0.0)
        yield


def run_here(folder: Path, probe: Path, memory: int, scratch: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(reload.main(str(folder), str(probe), memory, str(scratch))))
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
