"""Cache the activations of the calibration windows between one branch and the next.

They are the largest thing in memory beside a block: windows x tokens x width numbers. Within the budget they stay in
memory (the device's or the host's); past it they lie in a memory-mapped file, one slot a batch, and the system pages.
"""

import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class ActivationCache:
    """One tensor (windows, tokens, width) a batch, replaced in place as the walk goes on.

    A batch's width may change, up to `max_width`; how many windows and tokens it has may not. Batches are kept on
    `device`, or in `file` if one is given.
    """

    def __init__(
        self,
        batch_shapes: list[tuple[int, int]],
        max_width: int,
        dtype: torch.dtype,
        *,
        device: torch.device,
        file: Path | None = None,
    ) -> None:
        self.batches: list[Tensor | None] = [None] * len(batch_shapes)
        self.device = device
        self.slots: list[Tensor] | None = None
        if file is not None:
            sizes = [windows * tokens * max_width for windows, tokens in batch_shapes]
            reserve(file, sum(sizes) * dtype.itemsize)
            storage = torch.from_file(str(file), shared=True, size=sum(sizes), dtype=dtype)
            # Unlinked while open: the space goes back when the process ends, however it ends.
            file.unlink()
            self.slots = list(storage.split(sizes))

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def bytes_in_memory(self) -> int:
        return 0 if self.slots is not None else sum(batch.nbytes for batch in self.batches if batch is not None)

    def stored(self, index: int) -> Float[Tensor, "windows tokens width"]:
        """The stored batch, on the cache's device."""
        batch = self.batches[index]
        if batch is None:
            raise LookupError(f"batch {index} was never put into the cache")
        return batch

    def get(self, index: int, device: torch.device) -> Float[Tensor, "windows tokens width"]:
        return self.stored(index).to(device)

    def release(self) -> None:
        self.batches, self.slots = [None] * len(self.batches), None

    def put(self, index: int, activations: Float[Tensor, "windows tokens width"]) -> None:
        if self.slots is None:
            self.batches[index] = activations.to(self.device)
        else:
            slot = self.slots[index][: activations.numel()].view(activations.shape)
            self.batches[index] = slot.copy_(activations)


def reserve(file: Path, size: int) -> None:
    """Allocate the file's bytes on disk: writing to a mapped file on a full disk would kill the process.

    Raises OSError.
    """
    with file.open("wb") as opened:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(opened.fileno(), 0, size)
        else:
            opened.truncate(size)


def cache_bytes(num_windows: int, seq_len: int, width: int, dtype: torch.dtype) -> int:
    return math.prod((num_windows, seq_len, width, dtype.itemsize))


class Interner:
    """Hold equal tensors once: blocks and batches are mostly called with the same positions and masks.

    Call it with nested lists, tuples and dicts; it gives them back with equal tensors replaced by the first seen.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._first_equal(value)
        if isinstance(value, dict):
            return {key: self(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self(entry) for entry in value)
        return value

    def _first_equal(self, tensor: Tensor) -> Tensor:
        known = self._seen[tensor.shape, tensor.dtype]
        for candidate in known:
            if candidate is tensor or torch.equal(candidate, tensor):
                return candidate
        known.append(tensor)
        return tensor
