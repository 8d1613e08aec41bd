"""A checkpoint in memory, with what is trained in it."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from compress.models.loading import load_model
from compress.models.packed import LoraLinear
from compress.models.stored_loading import is_stored, load_stored
from compress.tuning.adapters import CompactAdapters, PackedAdapters
from compress.tuning.linears import dequantize
from compress.tuning.looking import Prepared
from compress.tuning.lora import Lora
from compress.tuning.structure import block_linears, compact_linears
from compress.tuning.training import Trained
from compress.tuning.weights import all_weights, factors


def open_trained(prepared: Prepared, device: torch.device) -> Trained:
    """The checkpoint in memory, with what is trained in it."""
    settings, dtype = prepared.job.settings, prepared.computing(device)
    model = open_folder(prepared.job.folder, dtype, device)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(settings.seed)
    trained = with_trained(model, prepared)
    if prepared.is_dequantized(device):
        dequantize(model, dtype)
    return trained


def with_trained(model: PreTrainedModel, prepared: Prepared) -> Trained:
    settings, what = prepared.job.settings, prepared.what
    if what == "factors":
        return factors(model)
    if what == "all":
        return all_weights(model)
    if what == "adapters":
        return CompactAdapters(model) if compact_linears(model) else PackedAdapters(model)
    linears = block_linears(model, prepared.config)
    if prepared.metadata.storage == "packed":
        linears = {path: linear for path, linear in linears.items() if isinstance(linear, LoraLinear)}
    return Lora(model, linears, rank=settings.rank, alpha=settings.alpha, merge=prepared.merge)


def open_teacher(prepared: Prepared, device: torch.device) -> PreTrainedModel | None:
    if prepared.teacher is None:
        return None
    return open_folder(prepared.teacher, prepared.computing(device), device).requires_grad_(False)


def open_folder(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A checkpoint that is finished, or finished but for its compress.json: what was packed stays packed in memory."""
    load = load_stored if is_stored(folder) else load_model
    return load(folder, dtype=dtype, device=device)
