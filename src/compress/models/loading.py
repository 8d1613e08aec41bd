"""Configs, tokenizers and whole models from a folder, with errors a user can act on."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from compress.errors import CheckpointError, UnsupportedModel


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        # transformers raises ValueError for a model_type it does not know and for code it was not allowed to run.
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedModel(f"The config.json of {folder} cannot be used: {first_line}") from error


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    if not any(any(folder.glob(pattern)) for pattern in ("tokenizer*", "*.model", "vocab*")):
        raise CheckpointError(
            f"{folder} has no tokenizer (tokenizer.json or its like). Copy the model's tokenizer there."
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"The tokenizer of {folder} cannot be read: {str(error).strip().splitlines()[0]}"
        ) from error


def load_model(
    folder: Path, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The whole model, for what needs it whole. Safetensors only."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True, local_files_only=True
    )
    model.to(device)  # type: ignore[arg-type]
    return model.eval()
