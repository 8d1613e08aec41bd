"""Count a model's parameters and bytes before any weight is read."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from compress.models.storage import num_parameters

# A safetensors header says a tensor's name, dtype, shape and place: what that takes beside the name, at most.
HEADER_BYTES_PER_TENSOR = 128
HEADER_BYTES_PER_FILE = 128


@dataclass(frozen=True)
class Size:
    """Parameters as they are stored (a tied head counts once), and bytes of all stored tensors."""

    parameters: int
    bytes: int


def size_of(model: nn.Module, dtype: torch.dtype) -> Size:
    """Count a model's size; floats are written in `dtype`, integers and 8-bit floats as they are."""
    stored = [*model.parameters(), *saved_buffers(model).values()]
    return Size(num_parameters(model), sum(tensor.numel() * written_dtype(tensor, dtype).itemsize for tensor in stored))


def written_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if tensor.is_floating_point() and tensor.dtype.itemsize > 1 else tensor.dtype


def header_bytes(name: str) -> int:
    return len(name) + HEADER_BYTES_PER_TENSOR


def saved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    saved = model.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def disk_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Upper bound on the bytes of the safetensors files, headers included, one file a part."""
    names = [name for name, _ in model.named_parameters()] + list(saved_buffers(model))
    headers = sum(header_bytes(name) for name in names)
    files = model.config.get_text_config().num_hidden_layers + 2
    return size_of(model, dtype).bytes + headers + files * HEADER_BYTES_PER_FILE


def by_depth(
    build: Callable[[int], PreTrainedModel], num_blocks: int, measure: Callable[[PreTrainedModel], int]
) -> int:
    """Count a deep model of equal blocks from those of one and two blocks; exact, and much faster to build."""
    one = measure(build(1))
    return one if num_blocks == 1 else one + (num_blocks - 1) * (measure(build(2)) - one)
