"""Read the header of a GGUF file, its fields and where its tensors lie, and the config of the model that it describes.

Format: ggml, docs/gguf.md. The package gguf knows the types of tensors; its own reader takes seconds and 150 MB for the
header of a small model, and the word of a damaged file for how much there is to read.

What a header can say beyond what is read here would make it another model, so a key that is not known is refused. So is
rotary scaling that transformers cannot compute to the same numbers.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from compress import families
from compress.errors import CheckpointError, UnsupportedModel
from compress.models.loading import LIMITS, check_sizes, check_values
from compress.models.untrusted import reading
from compress.own_model.configuration_compress import CompressConfig

VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
FLOAT32, STRING, ARRAY = 6, 8, 9
MOST_DIMENSIONS = 4
ALIGNMENT = 32  # where the field general.alignment does not say
SPLIT = "split.count"
LARGEST_HEADER = 2**26  # bytes; a vocabulary of a quarter million tokens with its merges takes a fifth


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's entry in a GGUF file.

    shape: as torch has it. kind: gguf's name of its type. start: its first byte. row_bytes: of its last dimension.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    row_bytes: int

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        return self.numbers // self.shape[-1]


@dataclass(frozen=True)
class Header:
    file: Path
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def read_rows(self, tensor: GgufTensor, first: int, last: int) -> np.ndarray:
        """Read rows as bytes. Raises OSError where the file has become shorter."""
        with self.file.open("rb") as opened:
            opened.seek(tensor.start + first * tensor.row_bytes)
            data = opened.read((last - first) * tensor.row_bytes)
        if len(data) < (last - first) * tensor.row_bytes:
            raise OSError("it has become shorter")
        return np.frombuffer(data, np.uint8).reshape(last - first, tensor.row_bytes)


class Cursor:
    """What a GGUF header is made of, one after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place = data, 0

    def advance(self, length: int) -> int:
        """Go on by so many bytes; return where they begin. Raises ValueError at the end of the data."""
        begin, self.place = self.place, self.place + length
        if self.place > min(len(self.data), LARGEST_HEADER):
            raise ValueError(f"its header claims {self.place:,} bytes or more")
        return begin

    def take(self, code: str) -> tuple[Any, ...]:
        return struct.unpack_from(f"<{code}", self.data, self.advance(struct.calcsize(f"<{code}")))

    def text(self) -> str:
        (length,) = self.take("Q")
        begin = self.advance(length)
        return self.data[begin : self.place].decode(errors="replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array()
        if kind not in SCALARS:
            raise ValueError(f"it has a value of the unknown type {kind}")
        (found,) = self.take(SCALARS[kind])
        # A float32 with as few digits as tell it apart: 1e-05, as the config had it before.
        return float(str(np.float32(found))) if kind == FLOAT32 else found

    def array(self) -> list[Any] | str:
        """Read a number for each block; go over longer arrays, such as a vocabulary."""
        kind, count = self.take("IQ")
        if kind in SCALARS and count <= LIMITS["num_hidden_layers"]:
            return list(self.take(f"{count}{SCALARS[kind]}"))
        if kind in SCALARS:
            self.advance(count * struct.calcsize(f"<{SCALARS[kind]}"))
        else:
            for _ in range(count):
                self.value(kind)
        return f"an array of {count:,}"


def read_header(file: Path) -> Header:
    """Raises CheckpointError for a damaged file, UnsupportedModel for one of several or types that are not known."""
    with reading(f"{file} is no GGUF file or damaged", "Get it again."), file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return parsed(file, Cursor(data))


def parsed(file: Path, cursor: Cursor) -> Header:
    _, version, tensor_count, field_count = cursor.take("4sIQQ")
    if version not in VERSIONS:
        raise ValueError(f"its version is {version}, and not 2 or 3")
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        name, (kind,) = cursor.text(), cursor.take("I")
        if name in fields:
            raise ValueError(f"it has the field {name!r} twice")
        fields[name] = cursor.value(kind)
    if fields.get(SPLIT, 1) > 1:
        raise UnsupportedModel(f"{file} is one of {fields[SPLIT]} parts. Join them: llama-gguf-split --merge.")
    entries = []
    for _ in range(tensor_count):
        name, (count,) = cursor.text(), cursor.take("I")
        if not 1 <= count <= MOST_DIMENSIONS:
            raise ValueError(f"{name!r} has {count} dimensions")
        entries.append((name, cursor.take(f"{count}Q"), *cursor.take("IQ")))
    alignment = fields.get("general.alignment", ALIGNMENT)
    begin = -(-cursor.place // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, dimensions, kind, offset in entries:
        if name in tensors:
            raise ValueError(f"it has the tensor {name!r} twice")
        tensors[name] = tensor = placed(file, name, dimensions, kind, begin + offset)
        end = tensor.start + tensor.rows * tensor.row_bytes
        if end > len(cursor.data):
            raise CheckpointError(
                f"{file} is cut short: {name!r} ends at byte {end:,} of {len(cursor.data):,}. Get it again."
            )
    return Header(file, fields, tensors)


def placed(file: Path, name: str, dimensions: tuple[int, ...], kind: int, start: int) -> GgufTensor:
    """Make a tensor's entry. dimensions: the fastest first, as ggml has them."""
    import gguf

    if not all(dimensions):
        raise ValueError(f"{name!r} has no numbers, its dimensions are {list(dimensions)}")
    try:
        known = gguf.GGMLQuantizationType(kind)
    except ValueError as error:
        raise UnsupportedModel(
            f"{file} has {name!r} in the type {kind}, which the package gguf does not know."
        ) from error
    numbers, size = gguf.GGML_QUANT_SIZES[known]
    if dimensions[0] % numbers:
        raise ValueError(f"the rows of {name!r} have {dimensions[0]} numbers, no multiple of {known.name}'s {numbers}")
    return GgufTensor(name, dimensions[::-1], known.name, start, dimensions[0] // numbers * size)


# The config.

FOLDER_INSTEAD = "Name the folder it was written from."
ROPE_FACTORS = "rope_freqs.weight"  # by what the rotary frequencies are divided


@dataclass(frozen=True)
class Architecture:
    """How one of llama.cpp's architectures maps to transformers.

    keys: what only this one says, by the header's names. interleaved: whether rows of queries and keys are in the order
    of llama.cpp. norms_from_one: whether gains are stored as what they multiply by, where transformers adds one.
    biases: whether attention and MLP may have some. activation: of the MLP; llama.cpp knows it by the architecture.
    local_rope: whether blocks with a window have rotary embeddings of their own.
    free_widths: whether MLPs may have a width in each block.
    """

    model_type: str
    keys: dict[str, str] = field(default_factory=dict)
    interleaved: bool = False
    norms_from_one: bool = False
    biases: bool = False
    activation: str = "silu"
    local_rope: bool = False
    free_widths: bool = False

    @property
    def all_keys(self) -> dict[str, str]:
        found = KEYS | self.keys
        if LAYER_NORM in found:
            del found[RMS_NORM]
        return found


WINDOW = {"attention.sliding_window": "sliding_window"}
SOFTCAPS = {f"{name}_logit_softcapping": f"{name}_logit_softcapping" for name in ("attn", "final")}
GEMMA3 = WINDOW | {
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "final_logit_softcapping": "final_logit_softcapping",
}
LAYER_NORM, RMS_NORM = "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"
MULTIPLIERS = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
TANH = "gelu_pytorch_tanh"
ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True, biases=True),  # Mistral too
    "deci": Architecture("llama", interleaved=True, biases=True, free_widths=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", norms_from_one=True, activation=TANH),
    "gemma2": Architecture("gemma2", WINDOW | SOFTCAPS, norms_from_one=True, activation=TANH),
    "gemma3": Architecture("gemma3_text", GEMMA3, norms_from_one=True, activation=TANH, local_rope=True),
    "phi3": Architecture("phi3", WINDOW | {"rope.scaling.original_context_length": "original_max_position_embeddings"}),
    "granite": Architecture("granite", MULTIPLIERS, interleaved=True, biases=True),
    "smollm3": Architecture("smollm3", interleaved=True),
    "olmo2": Architecture("olmo2"),
    "starcoder2": Architecture("starcoder2", {LAYER_NORM: "norm_epsilon"}, activation=TANH),
}
# The architecture that each model_type is written as.
WRITTEN = {known.model_type: name for name, known in ARCHITECTURES.items()} | {"llama": "llama", "mistral": "llama"}
DECI = ("llama", "mistral")  # the model_types that `deci` is with a width of its own in each MLP
KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    RMS_NORM: "rms_norm_eps",
}
OPTIONAL = ("attention.head_count_kv", "attention.key_length")
# Where the architecture has it: without a multiplier llama.cpp would take another one than transformers.
REQUIRED = ({*KEYS} - {*OPTIONAL}) | {LAYER_NORM, *MULTIPLIERS}
HEAD_SIZES = ("rope.dimension_count", "attention.value_length")  # which all have to be key_length
ROPE = ("rope.freq_base", "rope.scaling.type", "rope.scaling.factor")
LOCAL_BASE = "rope.freq_base_swa"
# The vocabulary has as many rows as its table; the others say how the model came to be.
WITHOUT_EFFECT = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "expert_count", "expert_used_count")
SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
# The blocks of Gemma's 27B: llama.cpp too knows by them alone that its queries are scaled in another way.
GEMMA_27B_BLOCKS = {"gemma2": 46, "gemma3_text": 62}
FULL, LOCAL = "full_attention", "sliding_attention"
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
    said = {key.removeprefix(prefix): alike(value) for key, value in header.fields.items() if key.startswith(prefix)}
    if said.get("expert_count") or any("_exps." in name for name in header.tensors):
        raise UnsupportedModel(f"{header.file} has experts. {FOLDER_INSTEAD}")
    local = {LOCAL_BASE} if known.local_rope else set()
    unknown = min(said.keys() - {*known.all_keys, *HEAD_SIZES, *ROPE, *local, *WITHOUT_EFFECT}, default=None)
    if unknown is not None:
        raise UnsupportedModel(
            f"{header.file} says {unknown} = {str(said[unknown])[:40]}, of which transformers' model would know "
            f"nothing. {FOLDER_INSTEAD}"
        )
    with reading(f"The header of {header.file} makes no model", "Get it again."):
        thetas = {FULL: said.get("rope.freq_base", 1e4)} | ({LOCAL: said.get(LOCAL_BASE, 1e4)} if local else {})
        bases = {kind: {"rope_type": "default", "rope_theta": float(theta)} for kind, theta in thetas.items()}
        config = AutoConfig.for_model(
            known.model_type,
            **sizes(header, known, said),
            **{name: header.fields.get(f"tokenizer.ggml.{key}_token_id") for key, name in SPECIAL.items()},
            dtype=written_dtype(header),
            tie_word_embeddings="output.weight" not in header.tensors,
            rope_parameters=bases if known.local_rope else bases[FULL],
        )
        check_sizes(header.file, config)
        if hasattr(config, "query_pre_attn_scalar"):
            config.query_pre_attn_scalar = query_scale(config)
        rope_of(config).update(rotary_scaling(header, said, config))
        return with_widths(config, mlp_widths(header, said)) if known.free_widths else config


def mlp_widths(header: Header, said: Mapping[str, Any]) -> list[int]:
    """The width of each block's MLP. Raises ValueError for what makes none."""
    found, count = said["feed_forward_length"], said["block_count"]
    widths = found if isinstance(found, list) else [found] * count
    if len(widths) != count:
        raise ValueError(f"it has {count} blocks and {len(widths)} widths of MLPs")
    for width in widths:
        check_values(header.file, {"intermediate_size": width})
    return widths


def with_widths(config: Any, widths: list[int]) -> CompressConfig:
    """The config of our class for a stock model with MLPs of these widths."""
    structure, ends = families.find(config).structure(), {name: getattr(config, name) for name in SPECIAL.values()}
    return CompressConfig(text_config=config, structure=structure, mlp_widths=widths, dtype=config.dtype, **ends)


def alike(value: Any) -> Any:
    """The one number that is said of each block, or what is said."""
    return value[0] if isinstance(value, list) and len(set(value)) == 1 else value


def rope_of(config: Any, kind: str = FULL) -> dict[str, Any]:
    """The rotary parameters of blocks of a kind, which most models have in common. The config's own, not a copy."""
    found: dict[str, Any] = config.rope_parameters or {}
    return found.get(kind, found)


def query_scale(config: Any) -> int:
    """The number by whose square root llama.cpp divides a Gemma's queries: but for the largest, the size of a head."""
    is_27b = config.num_hidden_layers == GEMMA_27B_BLOCKS.get(config.model_type)
    return int(config.hidden_size // config.num_attention_heads if is_27b else config.head_dim)


def sizes(header: Header, known: Architecture, said: Mapping[str, Any]) -> dict[str, Any]:
    """What the config has of the model's shape, by its own names. said: by the header's."""
    blocks = {name.split(".")[1] for name in header.tensors if name.startswith("blk.")}
    if len(blocks) != said.get("block_count"):  # before as many are built
        raise ValueError(f"it has {len(blocks)} blocks and says {said.get('block_count')}")
    absent = next((key for key in known.all_keys if key in REQUIRED and key not in said), None)
    if absent is not None:
        raise ValueError(f"it does not say {absent}")
    found = {name: said[key] for key, name in known.all_keys.items() if key in said}
    if known.free_widths:
        found["intermediate_size"] = max(mlp_widths(header, said))
        if isinstance(found["num_attention_heads"], list) or isinstance(found.get("num_key_value_heads"), list):
            raise UnsupportedModel(f"{header.file} has more heads in some blocks than in others. {FOLDER_INSTEAD}")
    found["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    found.setdefault("num_key_value_heads", found["num_attention_heads"])
    check_values(header.file, found)
    share = found["hidden_size"] // found["num_attention_heads"]
    head = found.setdefault("head_dim", share)
    if any(said.get(key, head) != head for key in HEAD_SIZES):
        raise UnsupportedModel(
            f"{header.file} rotates only a part of each head, or has values of another size than keys. {FOLDER_INSTEAD}"
        )
    if known.biases:
        biases = {name.split(".")[-2].partition("_")[0] for name in header.tensors if name.endswith(".bias")}
        found |= {"attention_bias": "attn" in biases, "mlp_bias": "ffn" in biases}
    if known.local_rope and not said.get("attention.sliding_window"):
        raise UnsupportedModel(f"{header.file} has no sliding window. {FOLDER_INSTEAD}")
    return found


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
    pairs = None if FULL in config.rope_parameters else (config.head_dim // 2,)
    if factors is not None and kind == "none" and factors.kind == "F32" and factors.shape == pairs:
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
