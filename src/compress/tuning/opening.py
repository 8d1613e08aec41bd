"""A checkpoint in memory, with what is trained in it."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from compress.models.loading import load_model
from compress.models.packed import LoraLinear
from compress.models.stored_loading import is_stored, load_stored
from compress.tuning.adapters import CompactAdapters, PackedAdapters
from compress.tuning.looking import Prepared
from compress.tuning.lora import Lora, StoredLora
from compress.tuning.structure import block_linears, compact_linears
from compress.tuning.training import Trained
from compress.tuning.weights import all_weights, factors


def open_trained(prepared: Prepared, device: torch.device) -> Trained:
    """The checkpoint in memory, with what is trained in it."""
    settings, what = prepared.job.settings, prepared.what
    model = open_folder(prepared.job.folder, prepared.computing(device), device)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(settings.seed)
    if what == "factors":
        return factors(model)
    if what == "all":
        return all_weights(model)
    if what == "adapters":
        return CompactAdapters(model) if compact_linears(model) else PackedAdapters(model)
    linears = block_linears(model, prepared.config)
    if prepared.facts.storage == "packed":
        stored = {path: linear for path, linear in linears.items() if isinstance(linear, LoraLinear)}
        return StoredLora(model, stored, rank=settings.rank, alpha=settings.alpha)
    return Lora(model, linears, rank=settings.rank, alpha=settings.alpha, merge=prepared.merge)


def open_folder(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A checkpoint that is finished, or finished but for its compress.json: what was packed stays packed in memory."""
    load = load_stored if is_stored(folder) else load_model
    return load(folder, dtype=dtype, device=device)
