"""Load any model ready to run: dense, compressed, or packed with its adapter."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from compress.models.hub import find_model
from compress.models.loading import load_config, load_model
from compress.models.stored_loading import is_stored, load_stored


def open_model(
    folder: Path, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a model. Checkpoints of ours stay packed in memory, adapter included; others are loaded by transformers."""
    if (folder / "compress.json").is_file() and is_stored(folder):
        return load_stored(folder, dtype=dtype, device=device)
    return load_model(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)


def load(model: str, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
    """
    model: a folder, a hub id or an alias. dtype: by default the checkpoint's own.
    """
    folder = find_model(model).whole_folder()
    own: torch.dtype = getattr(load_config(folder), "dtype", None) or torch.float32
    return open_model(folder, dtype=dtype or own, device=device)
