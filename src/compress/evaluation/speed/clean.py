"""Load a model and run it once, in a process that does nothing else. Run as a script:

    python -P clean.py '{"folder": ..., "dtype": ..., "device": ..., ...}'

Prints one JSON object: what `footprint.Footprint` is made of, or the problem of a model that does not load.
"""

import gc
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from compress.errors import CompressError
from compress.evaluation.speed.generation import Workload, runner
from compress.models.loading import empty_model, load_config
from compress.models.stored_loading import open_model

LOADS = 3


def main(folder: str, dtype: str, device: str, workload: dict[str, int], trust_remote_code: bool) -> dict[str, Any]:
    path, target = Path(folder), torch.device(device)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": target, "trust_remote_code": trust_remote_code}
    # What is imported for the first model is not the model's.
    if not trust_remote_code:
        empty_model(load_config(path))
    torch.empty(1, device=target)
    found: dict[str, Any] = {"before": peak(target), "seconds": []}
    model: Any = None
    for number in range(LOADS):
        model = None
        gc.collect()
        start = time.perf_counter()
        model = open_model(path, **options)
        if target.type == "cuda":
            torch.cuda.synchronize(target)
        found["seconds"].append(time.perf_counter() - start)
        if number == 0:
            # The first one's: later ones find the room that it left.
            read_all(model)
            found["loading"] = peak(target)
            found["running"] = running(model, Workload(**workload), target)
    return found


def read_all(model: Any) -> None:
    """A weight that is mapped from its file is in memory when it has been read: a number of every page."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().flatten()[::256].clone()


def running(model: Any, workload: Workload, device: torch.device) -> int | None:
    """The peak when the workload is done too; None where memory does not hold it."""
    try:
        runner(model, workload)()
    except torch.OutOfMemoryError:
        return None
    return peak(device)


def peak(device: torch.device) -> int | None:
    """Bytes: of the device's tensors, or on a CPU of the process, where the system tells it (Linux)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8")) if status.is_file() else None
    return int(match[1]) * 1024 if match else None


def answer(words: str) -> dict[str, Any]:
    try:
        return main(**json.loads(words))
    except CompressError as error:
        return {"problem": str(error)}
    except torch.OutOfMemoryError:
        return {"problem": None}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(answer(sys.argv[1])) + "\n")
