"""A llama-shaped checkpoint as the entries of a GGUF file: names, shapes and the order of rows in it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from compress.errors import UnsupportedModel
from compress.models.loading import empty_model, load_config
from compress.streaming.weights import READABLE, LazyWeights

MODULES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
BLOCK_MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: what it is there, and how to read it when its turn comes."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]


class Model:
    """A llama-shaped checkpoint. Of its weights only the biases have been read.

    biased: whether any bias is not zero; if none is, there are none in the file. rope: the rotary parameters.
    Raises UnsupportedModel for any other model, CheckpointError for a folder that is damaged or incomplete.
    """

    def __init__(self, folder: Path) -> None:
        self.config = load_config(folder)
        check_llama(self.config)
        self.weights = LazyWeights(folder)
        shapes = {name: parameter.shape for name, parameter in empty_model(self.config).state_dict().items()}
        if self.config.tie_word_embeddings:
            del shapes["lm_head.weight"]
        self.weights.check_against(shapes)
        biases = [name for name in shapes if name.endswith(".bias")]
        self.biased = any(bool(self.weights.read([name])[name].any()) for name in biases)
        self.rope = {"rope_type": "default", "rope_theta": 1e4} | (self.config.rope_parameters or {})
        # A zero bias is no bias: a sliced Qwen2 written as Llama has some.
        self.entries = [self._entry(name, shape) for name, shape in shapes.items() if self.biased or name not in biases]
        if self.rope["rope_type"] == "llama3":
            factors = llama3_factors(self.config)
            self.entries.append(Entry("rope_freqs.weight", factors.shape, factors.dtype, lambda: factors))

    @property
    def usual_dtype(self) -> torch.dtype:
        """Of the largest tensor, as of most weights."""
        return max(self.entries, key=lambda entry: entry.shape.numel()).dtype

    def _entry(self, name: str, shape: torch.Size) -> Entry:
        dtype = self._stored_dtype(name)
        dtype = torch.float32 if len(shape) == 1 or dtype == torch.float64 else dtype
        return Entry(gguf_name(name), shape, dtype, partial(self._read, name, dtype))

    def _stored_dtype(self, name: str) -> torch.dtype:
        stored = self.weights.resolve(name)
        assert stored is not None  # check_against has seen it
        return READABLE[self.weights.dtypes[stored]]

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        tensor = self.weights.read([name])[name].to(dtype)
        if ".q_proj." in name:
            return interleaved(tensor, self.config.num_attention_heads)
        if ".k_proj." in name:
            return interleaved(tensor, self.config.num_key_value_heads)
        return tensor


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


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight`."""
    module, kind = name.rsplit(".", 1)
    if module in MODULES:
        return f"{MODULES[module]}.{kind}"
    _, _, number, part = module.split(".", 3)
    return f"blk.{number}.{BLOCK_MODULES[part]}.{kind}"


def interleaved(tensor: Float[Tensor, "rows *columns"], heads: int) -> Float[Tensor, "rows *columns"]:
    """The rows of a query or key matrix, or its bias, in the order in which llama.cpp rotates them.

    Row i of a head is rotated with row i + half in transformers; there the two follow each other.
    """
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def llama3_factors(config: Any) -> Float32[Tensor, " pairs"]:
    """By what llama.cpp is to divide each rotary frequency, taken from the frequencies transformers computes."""
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    plain = 1.0 / config.rope_parameters["rope_theta"] ** steps
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return plain / scaled
