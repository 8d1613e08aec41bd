"""A llama-shaped checkpoint as the tensors of a GGUF file: their names, shapes and the order of rows in them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.calibration.weights import READABLE, LazyWeights
from compress.errors import UnsupportedModel
from compress.models.gguf_config import ROPE_FACTORS, llama3_factors
from compress.models.gguf_weights import interleaved
from compress.models.loading import empty_model, load_config

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: what it is there, and how to read it when its turn comes.

    shape: of its bytes where it has a block type. block_type: one of llama.cpp's, whose bytes are read as they are.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]
    block_type: str | None = None


@dataclass(frozen=True)
class Model:
    """
    rope: the rotary parameters.
    """

    config: Any
    rope: dict[str, Any]
    entries: list[Entry]


def read_model(folder: Path, types: Mapping[str, str]) -> Model:
    """A llama-shaped checkpoint, of whose weights only the biases have been read.

    types: the block types of the tensors that are stored as such, by path.
    Raises UnsupportedModel for any other model, CheckpointError for a folder that is damaged or incomplete.
    """
    import gguf

    config = load_config(folder)
    check_llama(config)
    weights = LazyWeights(folder)
    shapes = {name: parameter.shape for name, parameter in empty_model(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    quantized = {f"{path}.weight": f"{path}.qweight" for path in types}
    weights.check_against({name: shape for name, shape in shapes.items() if name not in quantized})
    biases = [name for name in shapes if name.endswith(".bias")]
    # A zero bias is no bias: a sliced Qwen2 written as Llama has some.
    if not any(bool(weights.read([name])[name].any()) for name in biases):
        shapes = {name: shape for name, shape in shapes.items() if name not in biases}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    entries = []
    for name, shape in shapes.items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None  # the map has every tensor of a Llama
        if stored := quantized.get(name):
            shape = torch.Size(weights.stored.tensors[stored].shape)
            read = partial(read_rows, weights, stored, config, torch.uint8)
            entries.append(Entry(theirs, shape, torch.uint8, read, types[name.removesuffix(".weight")]))
            continue
        dtype = READABLE[weights.stored.tensors[str(weights.resolve(name))].dtype]
        # llama.cpp computes with norms and biases in float32; GGUF has float64 for none.
        dtype = torch.float32 if len(shape) == 1 or dtype == torch.float64 else dtype
        entries.append(Entry(theirs, shape, dtype, partial(read_rows, weights, name, config, dtype)))
    rope = {"rope_type": "default", "rope_theta": 1e4} | (config.rope_parameters or {})
    if rope["rope_type"] == "llama3":
        factors = llama3_factors(config)
        entries.append(Entry(ROPE_FACTORS, factors.shape, factors.dtype, lambda: factors))
    return Model(config, rope, entries)


def read_rows(weights: LazyWeights, name: str, config: Any, dtype: torch.dtype) -> Tensor:
    """A tensor, its rows in the file's order."""
    tensor = weights.read([name])[name].to(dtype)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    return tensor if heads is None else interleaved(tensor, heads)


def check_llama(config: Any) -> None:
    """Raises UnsupportedModel for the config of a model that the architecture `llama` of GGUF does not cover."""
    if reason := why_not_llama(config):
        raise UnsupportedModel(
            f"The model cannot be written as GGUF: {reason}. GGUF is written for Llama, and for Mistral without a "
            "sliding window. Leave GGUF out: transformers loads the folder without it."
        )


def why_not_llama(config: Any) -> str | None:
    """What of a config the architecture `llama` of GGUF cannot say, if anything."""
    expected = ARCHITECTURES.get(config.model_type)
    if expected is None:
        return f"its model_type is {config.model_type!r}"
    if expected not in (config.architectures or [expected]):
        return f"its architecture is {', '.join(config.architectures)}, not {expected}"
    if config.hidden_act not in ("silu", "swish"):
        return f"its activation is {config.hidden_act!r}, not 'silu'"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        return f"its sliding window of {window} is less than its {config.max_position_embeddings} positions"
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        return f"its rotary embeddings are scaled by {rope['rope_type']!r}, which is none of {', '.join(ROPE_TYPES)}"
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        return f"it rotates only a part of each head (partial_rotary_factor {rope['partial_rotary_factor']})"
    return None
