"""Memory: what a checkpoint and a workload will take, what is free, and work that may not fit."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from transformers import PreTrainedModel

from compress.models.stored_files import ADAPTER
from compress.models.tensor_files import FLOATS, checkpoint_files, read_header

T = TypeVar("T")


def tensor_files(folder: Path) -> list[Path]:
    """All files with tensors: the model's, and those of an adapter beside it."""
    return [*checkpoint_files(folder), *sorted((folder / ADAPTER).glob("*.safetensors"))]


def bytes_on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in tensor_files(folder))


def bytes_in_memory(folder: Path, dtype: torch.dtype) -> int:
    """Of the tensors, loaded in a dtype; from the headers of the files."""
    tensors = [tensor for file in tensor_files(folder) for tensor in read_header(file)]
    return sum(each.numbers * dtype.itemsize if each.dtype in FLOATS else each.bytes for each in tensors)


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def workload_bytes(config: Any, batch: int, length: int, dtype: torch.dtype) -> int:
    """Of the keys and values of `length` tokens a row, and of one position's logits; about."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = 2 * text.num_hidden_layers * heads * head * length
    return batch * dtype.itemsize * (cache + text.vocab_size)


def has_room(model: PreTrainedModel, batch: int, length: int) -> bool:
    """On the CPU, where a system out of memory ends the process: whether half of what is free holds the workload.

    Elsewhere always: there it can be tried out (`attempted`).
    """
    if model.device.type != "cpu":
        return True
    # Keys and values are copied as they grow.
    return 2 * workload_bytes(model.config, batch, length, model.dtype) < free_bytes(model.device) / 2


def attempted(work: Callable[[], T]) -> T | None:
    """What work gives, or None where the device's memory does not hold it."""
    try:
        return work()
    except torch.OutOfMemoryError:
        pass
    # Not before the exception is gone: its traceback holds the tensors.
    gc.collect()
    torch.cuda.empty_cache()
    return None


def read_through(folder: Path) -> None:
    """Bring the files into the page cache, as far as there is room."""
    for file in tensor_files(folder):
        with file.open("rb") as opened:
            while opened.read(2**24):
                pass
