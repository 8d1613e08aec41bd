"""Load configs, tokenizers and whole models from a folder, with errors a user can act on."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.initialization import no_init_weights

from compress.errors import CheckpointError, UnsupportedModel, UsageError
from compress.models.untrusted import one_line, read_json, reading, shown
from compress.version import FORMAT

NO_MODEL = "The model's config.json makes no model"


# What a model may come to: one that a damaged file made up would take all memory, or years to be built. Each limit is
# some ten times what the largest models have.
LIMITS = {
    "num_hidden_layers": 1000,
    "hidden_size": 2**18,
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), 2**20),
    "num_attention_heads": 2**12,
    "head_dim": 2**14,
    "vocab_size": 2**23,
    "max_position_embeddings": 2**27,
}

BY_BLOCK = ("layer_types", "no_rope_layers")  # what a config has an entry of for each block


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Raises UnsupportedModel for what transformers does not know, CheckpointError for what makes no model."""
    file = folder / "config.json"
    if str(read_json(file).get("model_type")).startswith("compress_"):  # the architectures of format 1
        check_format(folder, 1)
    with reading(f"{file} makes no model"):
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            # transformers raises ValueError for a model_type it does not know and for code it was not allowed to run.
            raise UnsupportedModel(f"The config.json of {folder} cannot be used: {one_line(error)}") from error
    check_sizes(file, config)
    if not trust_remote_code and hasattr(config, "auto_map"):
        del config.auto_map  # no output names code that was not run
    return config


def check_format(folder: Path, number: int) -> None:
    """Raises CheckpointError for a checkpoint of ours in a format that this version does not read."""
    if number != FORMAT:
        remedy = "Make it again with this version" if number < FORMAT else "Update compress"
        raise CheckpointError(
            f"{folder} is a checkpoint of format {number}; this version of compress reads format {FORMAT}. {remedy}."
        )


def check_sizes(file: Path, config: Any) -> None:
    for each in (config, getattr(config, "text_config", config)):
        check_values(file, {name: getattr(each, name, None) for name in LIMITS})


def check_values(file: Path, found: Mapping[str, Any]) -> None:
    """Check the sizes in a config. found: what a config is made from."""
    for name, limit in LIMITS.items():
        value = found.get(name)
        if value is not None and not (type(value) is int and 1 <= value <= limit):
            raise CheckpointError(
                f"{file} makes no model: {name} is {str(value)[:40]}. It must be a number from 1 to {limit:,}."
            )


def with_blocks(config: Any, numbers: Sequence[int]) -> Any:
    """Copy a config for the model that has only the blocks of these numbers."""
    found = copy.deepcopy(config)
    found.num_hidden_layers = len(numbers)
    for name in BY_BLOCK:
        if each := getattr(found, name, None):
            setattr(found, name, [each[number] for number in numbers])
    if (first := getattr(found, "first_k_dense_replace", None)) is not None:
        found.first_k_dense_replace = sum(number < first for number in numbers)
    if hasattr(found, "decoder_sparse_step"):  # of every so many blocks one has experts, but for those that are listed
        only, step = found.mlp_only_layers or (), found.decoder_sparse_step
        found.mlp_only_layers = [new for new, old in enumerate(numbers) if old in only or (old + 1) % step]
        found.decoder_sparse_step = 1
    return found


def empty_model(config: Any) -> PreTrainedModel:
    """Build a model from its config on the meta device."""
    # Under torch's own context transformers leaves out the initialization, most of the time it takes.
    with reading(NO_MODEL), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def hollow_model(config: Any, dtype: torch.dtype, said: str = NO_MODEL) -> PreTrainedModel:
    """Build a model with parameters on the meta device and real buffers."""
    with reading(said), no_init_weights(), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def check_vocabulary(windows: torch.Tensor, config: Any, folder: Path) -> None:
    largest, size = int(windows.max()), config.get_text_config().vocab_size
    if largest >= size:
        raise CheckpointError(
            f"The tokenizer of {folder} gives token {largest}, but the model has a vocabulary of {size}. "
            "It is another model's: copy this one's there."
        )


def check_positions(config: Any, seq_len: int) -> None:
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and seq_len > positions:
        raise UsageError(
            f"--seq-len {seq_len} is more than the model's {positions} positions. Use --seq-len {positions}."
        )


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load a tokenizer and try it on a text: some load from anything and fail in use."""
    if not any(any(folder.glob(pattern)) for pattern in ("tokenizer*", "*.model", "vocab*")):
        raise CheckpointError(
            f"{folder} has no tokenizer (tokenizer.json or its like). Copy the model's tokenizer there."
        )
    with reading(f"The tokenizer of {folder} cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        torch.tensor(tokenizer("A text.", verbose=False)["input_ids"], dtype=torch.int64)
    return tokenizer


def load_model(
    folder: Path, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load the whole model. Safetensors only, and every parameter must be stored."""
    load_config(folder, trust_remote_code=trust_remote_code)  # whose sizes are looked at there
    with reading(f"{folder} with its config.json makes no model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    model, info = loaded
    for kind, said in (
        ("missing_keys", f"The checkpoint {folder} lacks tensors of its model"),
        ("mismatched_keys", f"Tensors of {folder} have other shapes than config.json says"),
    ):
        keys = sorted(" ".join(map(str, key)) if isinstance(key, tuple) else str(key) for key in info[kind])
        if keys:
            raise CheckpointError(f"{said}: {shown(keys)}.")
    return model.to(device).eval()
