"""What a model takes: bytes on disk, seconds to load, memory while it is loaded and while it runs."""

import json
import signal
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from compress.child_process import run_in_child
from compress.errors import CheckpointError, UsageError
from compress.evaluation.speed import clean
from compress.evaluation.speed.generation import Workload
from compress.evaluation.speed.memory import bytes_on_disk, read_through
from compress.evaluation.speed.timing import Spread


@dataclass(frozen=True)
class Footprint:
    """
    disk: bytes of the files with tensors. load: seconds, with these files in the page cache.
    before, loading, running: the most bytes held until then: with the libraries alone, when the model had been loaded,
        and when it had run the workload. On CUDA of the device's tensors, on a CPU of the whole process. None where
        that is not known, or where memory did not hold it.
    """

    disk: int
    load: Spread
    before: int | None
    loading: int | None
    running: int | None


def footprint(
    folder: Path, workload: Workload, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> Footprint:
    """Measured in a clean process: a process's peak does not sink again, and a fork begins with its parent's.

    Raises CheckpointError for a model that does not load, UsageError for one that memory does not hold.
    """
    read_through(folder)
    asked = {
        "folder": str(folder.absolute()),
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "workload": asdict(workload),
        "trust_remote_code": trust_remote_code,
    }
    quiet = {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = run_in_child("-P", clean.__file__, [json.dumps(asked)], quiet)
    found = answered(done, folder)
    if found.get("problem", "") is None:
        raise UsageError(
            f"{folder} in {asked['dtype']} does not fit into the memory of {device}. "
            "Try --dtype bfloat16 or another --device."
        )
    if "problem" in found:
        raise CheckpointError(found["problem"])
    peaks = {name: found[name] for name in ("before", "loading", "running")}
    return Footprint(bytes_on_disk(folder), Spread.of(found["seconds"]), **peaks)


def answered(done: "subprocess.CompletedProcess[str]", folder: Path) -> dict[str, Any]:
    """What the process printed; that there was no memory where the system ended it."""
    if done.returncode == -signal.SIGKILL:
        return {"problem": None}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise CheckpointError(f"{folder} cannot be loaded and run in a process of its own: {last[0]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
