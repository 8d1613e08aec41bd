"""What an output comes from: enough to tell whether two runs would give the same bytes."""

import hashlib
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from compress.datasets.windows import fingerprint
from compress.planning.memory import usual_batch_size
from compress.planning.prepare import Prepared
from compress.streaming.weights import LazyWeights
from compress.version import FORMAT, __version__


def identity(prepared: Prepared) -> dict[str, Any]:
    """What determines the output's bytes."""
    job = prepared.job
    return {
        "recipe": job.recipe.model_dump(mode="json"),
        "model": input_fingerprint(prepared.folder, prepared.weights),
        "calibration text": fingerprint(prepared.windows),
        "format": FORMAT,
        "versions": versions(),
        "export": job.export,
        "device": job.device.type,
        "batch size": batch_size(prepared),
        "number of processes": prepared.processes.count,
        "dtype": str(prepared.precision.written).removeprefix("torch."),
    }


def batch_size(prepared: Prepared) -> int | None:
    """Windows at a time, where it is not the usual number: as the user said it, or as memory allows."""
    chosen, job = prepared.plan.room.batch_size, prepared.job
    return job.batch_size if chosen == usual_batch_size(job.recipe) else chosen


def versions() -> dict[str, str]:
    return {
        "compress": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def input_fingerprint(folder: Path, weights: LazyWeights) -> str:
    """sha256 over config.json, the names, shapes and types of all tensors, and a row from the midst of each."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for name, sample in weights.samples():
        tensor = weights.stored.tensors[name]
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(sample)
    return digest.hexdigest()
