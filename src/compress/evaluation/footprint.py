"""What a model takes: bytes on disk and in memory, seconds to load, the most memory while it is loaded and runs.

    python -P footprint.py '{"folder": ..., "dtype": ..., "device": ..., ...}'

loads a model and runs it once, in a process that does nothing else, and prints one JSON object.
"""

import gc
import json
import re
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from compress.errors import CheckpointError, CompressError, UsageError
from compress.evaluation.speed import Workload, attempted, current, runner, seconds, spread
from compress.models.loading import empty_model, load_config
from compress.models.stored_loading import open_model
from compress.models.tensor_files import ADAPTER, FLOATS, checkpoint_files, read_header
from compress.process import run_in_child

LOADS = 3
QUIET = {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def tensor_files(folder: Path) -> list[Path]:
    """All files with tensors: the model's, and those of an adapter beside it."""
    return [*checkpoint_files(folder), *sorted((folder / ADAPTER).glob("*.safetensors"))]


def bytes_on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in tensor_files(folder))


def bytes_in_memory(folder: Path, dtype: torch.dtype) -> int:
    """Of the tensors, loaded in a dtype; from the headers of the files."""
    tensors = [tensor for file in tensor_files(folder) for tensor in read_header(file)]
    return sum(each.numbers * dtype.itemsize if each.dtype in FLOATS else each.bytes for each in tensors)


def footprint(
    folder: Path, workload: Workload, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Measured in a clean process: a process's peak does not sink again, and a fork begins with its parent's.

    disk: bytes of the files with tensors. load: seconds, with these files in the page cache.
    before, loading, running: the most bytes held until then: with the libraries alone, when the model had been loaded,
        and when it had run the workload. On CUDA of the device's tensors, on a CPU of the whole process. None where
        that is not known, or where memory did not hold it.

    Raises CheckpointError for a model that does not load, UsageError for one that memory does not hold.
    """
    for file in tensor_files(folder):  # into the page cache, as far as there is room
        with file.open("rb") as opened:
            while opened.read(2**24):
                pass
    options = {"folder": str(folder.absolute()), "dtype": str(dtype).removeprefix("torch."), "device": str(device)}
    asked = {**options, "workload": asdict(workload), "trust_remote_code": trust_remote_code}
    done = run_in_child("-P", __file__, [json.dumps(asked)], QUIET)
    if done.returncode not in (0, -signal.SIGKILL):
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise CheckpointError(f"{folder} cannot be loaded and run in a process of its own: {last[0]}")
    found: dict[str, Any] = {"problem": None} if done.returncode else json.loads(done.stdout.splitlines()[-1])
    if found.get("problem", "") is None:  # the system ends a process that takes too much
        raise UsageError(
            f"{folder} in {options['dtype']} does not fit into the memory of {device}. "
            "Try --dtype bfloat16 or another --device."
        )
    if "problem" in found:
        raise CheckpointError(found["problem"])
    return {"disk": bytes_on_disk(folder), "load": spread(found.pop("seconds")), **found}


# In the clean process.


def answer(words: str) -> dict[str, Any]:
    """The numbers of `footprint`, or the problem of a model that does not load: None for memory."""
    try:
        return loaded_and_run(**json.loads(words))
    except CompressError as error:
        return {"problem": str(error)}
    except torch.OutOfMemoryError:
        return {"problem": None}


def loaded_and_run(
    folder: str, dtype: str, device: str, workload: dict[str, int], trust_remote_code: bool
) -> dict[str, Any]:
    path, target = Path(folder), torch.device(device)
    # What is imported for the first model is not the model's.
    if not trust_remote_code:
        empty_model(load_config(path))
    torch.empty(1, device=target)
    found: dict[str, Any] = {"before": peak(target), "seconds": []}
    held: list[Any] = []
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": target, "trust_remote_code": trust_remote_code}
    for number in range(LOADS):
        held.clear()
        gc.collect()
        with current(target):
            found["seconds"].append(seconds(lambda: held.append(open_model(path, **options))))
        if number == 0:
            # The first one's: later ones find the room that it left. A weight that is mapped from its file is in memory
            # when it has been read: a number of every page.
            for tensor in (*held[0].parameters(), *held[0].buffers()):
                tensor.detach().flatten()[::256].clone()
            found["loading"] = peak(target)
            ran = attempted(runner(held[0], Workload(**workload)))
            found["running"] = None if ran is None else peak(target)
    return found


def peak(device: torch.device) -> int | None:
    """Bytes: of the device's tensors, or on a CPU of the process, where the system tells it (Linux)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8")) if status.is_file() else None
    return int(match[1]) * 1024 if match else None


if __name__ == "__main__":
    sys.stdout.write(json.dumps(answer(sys.argv[1])) + "\n")
