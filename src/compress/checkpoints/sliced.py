"""The config of a sliced model, and what its numbers come to, before any weight is read."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from compress.families import Family
from compress.models.configuration_sliced import SlicedConfig
from compress.models.loading import empty_model
from compress.models.modeling_sliced import SlicedForCausalLM

CARRIED = ("configuration_sliced", "modeling_sliced")


def sliced_config(config: Any, family: Family, widths: Sequence[int], dtype: torch.dtype) -> SlicedConfig:
    """
    widths: of the stream after the embeddings and after each branch.
    """
    text_config = copy.deepcopy(config)
    # The embeddings and the head lie in different bases, so what was tied no longer is.
    text_config.tie_word_embeddings = False
    text_config.name_or_path = ""  # a path of the machine it was made on
    sliced = SlicedConfig(
        text_config=text_config,
        structure=family.structure(),
        stream_widths=list(widths),
        norm_width=config.hidden_size,
        norm_eps=family.epsilon(config),
        reader_bias=family.norm == "layer" and getattr(config, "layer_norm_elementwise_affine", True),
        architectures=["SlicedForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_sliced.SlicedConfig",
            "AutoModelForCausalLM": "modeling_sliced.SlicedForCausalLM",
        },
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    sliced.dtype = dtype
    return sliced


@dataclass(frozen=True)
class Size:
    """Parameters as they are stored (a tied head counts once), and their bytes."""

    parameters: int
    bytes: int


def dense_size(config: Any, dtype: torch.dtype) -> Size:
    model = empty_model(copy.deepcopy(config))
    if config.tie_word_embeddings:
        model.tie_weights()
    return size_of(model, dtype)


def sliced_size(config: SlicedConfig, dtype: torch.dtype) -> Size:
    with torch.device("meta"):
        model = SlicedForCausalLM(copy.deepcopy(config))
    return size_of(model, dtype)


def size_of(model: PreTrainedModel, dtype: torch.dtype) -> Size:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Size(parameters, parameters * dtype.itemsize)
