"""The model that a checkpoint's config.json describes, without weights, and whether the files hold it."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from compress.checkpoints.metadata import METADATA, Metadata
from compress.errors import CheckpointError
from compress.models.loading import empty_model, load_config
from compress.models.storage import num_parameters
from compress.models.stored_loading import Lora, put_linears, read_lora, read_scheme, stored_tensors
from compress.models.tensor_files import StoredTensor, own_name
from compress.models.untrusted import reading
from compress.own_model.modeling_compress import unfuse_experts

ENDS = 2  # parts that are no block: the embeddings and the head


def blueprint(folder: Path, metadata: Metadata) -> PreTrainedModel:
    """On the meta device, with its linears as they are stored. Raises CheckpointError where config.json makes none."""
    with reading(f"The config.json of {folder} makes no model", "Get it again."):
        return built(folder, metadata)


def built(folder: Path, metadata: Metadata) -> PreTrainedModel:
    config = load_config(folder)
    num_blocks = config.get_text_config().num_hidden_layers
    parts = [name for name in metadata.parts if "/" not in name]
    # Before it is built: a count out of thin air would take forever.
    if num_blocks != len(parts) - ENDS:
        raise CheckpointError(f"config.json of {folder} says {num_blocks} blocks, {METADATA} {len(parts) - ENDS}.")
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # no library is to act on it
    model = unfuse_experts(empty_model(config))
    model.tie_weights()
    lora = read_lora(folder)
    put_linears(model, read_scheme(folder), stored_tensors(folder, lora), torch.float32)
    return model


def named(tensors: list[StoredTensor], lora: Lora | None) -> dict[str, StoredTensor]:
    """By the names that tensors have in the model."""
    inside = {} if lora is None else {stored: name for name, stored in lora.names.items()}
    return {own_name(inside.get(tensor.name, tensor.name)): tensor for tensor in tensors}


def check_against(model: PreTrainedModel, tensors: dict[str, StoredTensor], metadata: Metadata) -> None:
    """That the files hold the model's tensors in its shapes, and no others. Raises CheckpointError."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys)
    missing = sorted(expected.keys() - tensors.keys() - tied)
    if missing:
        raise CheckpointError(f"config.json describes a model with {missing[0]!r}, which is in no file. Get it again.")
    unknown = sorted(tensors.keys() - expected.keys())
    if unknown:
        raise CheckpointError(f"The tensor {unknown[0]!r} has no place in the model of config.json. Get it again.")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name]:
            raise CheckpointError(
                f"The tensor {name!r} has the shape {list(tensor.shape)}, config.json says {list(expected[name])}. "
                "Get it again."
            )
    counted = num_parameters(model)
    if counted != metadata.size.parameters:
        raise CheckpointError(
            f"{METADATA} says {metadata.size.parameters:,} parameters, the files hold {counted:,}. Get it again."
        )
