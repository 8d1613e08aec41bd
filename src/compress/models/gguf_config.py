"""Read the config of a model from the header of its GGUF file.

What a header can say beyond what is read here would make it another model, so a key that is not known is refused. So is
rotary scaling that transformers cannot compute to the same numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from compress.errors import UnsupportedModel
from compress.models.gguf_header import Header
from compress.models.loading import check_sizes, check_values
from compress.models.untrusted import reading

FOLDER_INSTEAD = "Name the folder it was written from."
ROPE_FACTORS = "rope_freqs.weight"  # by what the rotary frequencies are divided


@dataclass(frozen=True)
class Architecture:
    """
    keys: what only this one says, by the header's names. interleaved: whether rows of queries and keys are in the order
    of llama.cpp. norms_from_one: whether gains are stored as what they multiply by, where transformers adds one.
    """

    model_type: str
    keys: dict[str, str] = field(default_factory=dict)
    interleaved: bool = False
    norms_from_one: bool = False


WINDOW = {"attention.sliding_window": "sliding_window"}
SOFTCAPS = {f"{name}_logit_softcapping": f"{name}_logit_softcapping" for name in ("attn", "final")}
ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True),  # Mistral too
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", norms_from_one=True),
    "gemma2": Architecture("gemma2", WINDOW | SOFTCAPS, norms_from_one=True),
    "phi3": Architecture("phi3", WINDOW | {"rope.scaling.original_context_length": "original_max_position_embeddings"}),
}
# The architecture that each model_type is written as. Gemma's is not: transformers does not read it back.
WRITTEN = {known.model_type: name for name, known in ARCHITECTURES.items() if name != "gemma"} | {"mistral": "llama"}
KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
OPTIONAL = ("attention.head_count_kv", "attention.key_length")
HEAD_SIZES = ("rope.dimension_count", "attention.value_length")  # which all have to be key_length
ROPE = ("rope.freq_base", "rope.scaling.type", "rope.scaling.factor")
# The vocabulary has as many rows as its table; the others say how the model came to be.
WITHOUT_EFFECT = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "expert_count", "expert_used_count")
SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
GEMMA2_27B_BLOCKS = 46  # llama.cpp too knows by them alone that its queries are scaled in another way
LLAMA31 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def tensor_names(architecture: str, num_blocks: int) -> Any:
    """gguf's map of a model's tensor names to those in a file."""
    import gguf

    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(numbers[architecture], num_blocks)


def architecture_of(header: Header) -> Architecture:
    name = header.fields.get("general.architecture")
    if name not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{header.file} is of the architecture {name!r}. Read are {', '.join(ARCHITECTURES)}. {FOLDER_INSTEAD}"
        )
    return ARCHITECTURES[name]


def read_config(header: Header) -> Any:
    """Raises UnsupportedModel for what transformers' model would not compute, CheckpointError for what makes none."""
    known, prefix = architecture_of(header), f"{header.fields['general.architecture']}."
    said = {key.removeprefix(prefix): value for key, value in header.fields.items() if key.startswith(prefix)}
    check_keys(header, said, {*KEYS, *known.keys, *HEAD_SIZES, *ROPE, *WITHOUT_EFFECT})
    with reading(f"The header of {header.file} makes no model", "Get it again."):
        config = AutoConfig.for_model(
            known.model_type,
            **sizes(header, known, said),
            **{name: header.fields.get(f"tokenizer.ggml.{key}_token_id") for key, name in SPECIAL.items()},
            dtype=written_dtype(header),
            tie_word_embeddings="output.weight" not in header.tensors,
            rope_parameters={"rope_type": "default", "rope_theta": float(said.get("rope.freq_base", 1e4))},
        )
        check_sizes(header.file, config)
        config.rope_parameters |= rotary_scaling(header, said, config)
    return config


def sizes(header: Header, known: Architecture, said: Mapping[str, Any]) -> dict[str, Any]:
    """What the config has of the model's shape, by its own names. said: by the header's."""
    blocks = {name.split(".")[1] for name in header.tensors if name.startswith("blk.")}
    if len(blocks) != said.get("block_count"):  # before as many are built
        raise ValueError(f"it has {len(blocks)} blocks and says {said.get('block_count')}")
    absent = next((key for key in KEYS if key not in (*said, *OPTIONAL)), None)
    if absent is not None:
        raise ValueError(f"it does not say {absent}")
    found = {name: said[key] for key, name in (KEYS | known.keys).items() if key in said}
    found["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    found.setdefault("num_key_value_heads", found["num_attention_heads"])
    check_values(header.file, found)
    share = found["hidden_size"] // found["num_attention_heads"]
    head = found.setdefault("head_dim", share)
    if any(said.get(key, head) != head for key in HEAD_SIZES):
        raise UnsupportedModel(
            f"{header.file} rotates only a part of each head, or has values of another size than keys. {FOLDER_INSTEAD}"
        )
    if known.model_type == "llama":
        biases = {name.split(".")[-2].partition("_")[0] for name in header.tensors if name.endswith(".bias")}
        found |= {"attention_bias": "attn" in biases, "mlp_bias": "ffn" in biases}
    if known.model_type == "gemma2":
        found["query_pre_attn_scalar"] = share if found["num_hidden_layers"] == GEMMA2_27B_BLOCKS else head
    return found


def check_keys(header: Header, said: Mapping[str, Any], known: set[str]) -> None:
    if said.get("expert_count") or any("_exps." in name for name in header.tensors):
        raise UnsupportedModel(f"{header.file} has experts. {FOLDER_INSTEAD}")
    unknown = min(said.keys() - known, default=None)
    if unknown is not None:
        raise UnsupportedModel(
            f"{header.file} says {unknown} = {str(said[unknown])[:40]}, of which transformers' model would know "
            f"nothing. {FOLDER_INSTEAD}"
        )


def written_dtype(header: Header) -> torch.dtype:
    """The dtype of most numbers; float16 where they are quantized."""
    counts = dict.fromkeys(("F32", "BF16"), 0) | {"other": 0}
    for tensor in header.tensors.values():
        counts[tensor.kind if tensor.kind in counts else "other"] += tensor.numbers
    most = max(counts, key=lambda kind: counts[kind])
    return {"F32": torch.float32, "BF16": torch.bfloat16}.get(most, torch.float16)


def rotary_scaling(header: Header, said: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """What the rotary parameters have beyond their base. Raises UnsupportedModel where they would become others."""
    kind, factors = said.get("rope.scaling.type", "none"), header.tensors.get(ROPE_FACTORS)
    if factors is None and kind == "none":
        return {}
    if factors is None and kind == "linear":
        return {"rope_type": "linear", "factor": float(said["rope.scaling.factor"])}
    if factors is not None and kind == "none" and factors.kind == "F32" and factors.shape == (config.head_dim // 2,):
        stored = torch.from_numpy(header.read_rows(factors, 0, 1).view(np.float32)[0].copy())
        found = {"rope_type": "llama3", "factor": round(float(stored[-1]), 4), **LLAMA31}
        scaled = type(config)(**config.to_dict() | {"rope_parameters": config.rope_parameters | found})
        if torch.allclose(stored, llama3_factors(scaled), rtol=1e-5, atol=0):
            return found
    raise UnsupportedModel(
        f"The rotary embeddings of {header.file} are scaled in a way that does not go back into a config "
        f"({kind if factors is None else ROPE_FACTORS}). {FOLDER_INSTEAD}"
    )


def llama3_factors(config: Any) -> Float32[Tensor, " pairs"]:
    """By what llama.cpp is to divide each rotary frequency, taken from the frequencies transformers computes."""
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    plain = 1.0 / config.rope_parameters["rope_theta"] ** steps
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return plain / scaled
