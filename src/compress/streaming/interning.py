"""Equal tensors held once: blocks and batches are mostly called with the same positions and masks."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor


class Interner:
    """Call it with nested lists, tuples and dicts; it gives them back with equal tensors replaced by the first seen."""

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
