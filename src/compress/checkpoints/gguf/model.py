"""A checkpoint as the tensors of a GGUF file: their names, shapes and the order of rows in them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from compress.architectures.gguf_types import row_bytes
from compress.calibration.weights import READABLE, LazyWeights
from compress.errors import UnsupportedModel
from compress.models.gguf_header import (
    ARCHITECTURES,
    DECI,
    FULL,
    LOCAL,
    ROPE_FACTORS,
    WRITTEN,
    llama3_factors,
    query_scale,
    rope_of,
    tensor_names,
)
from compress.models.gguf_weights import interleaved
from compress.models.loading import empty_model, load_config
from compress.numerics.block_grid import fit_blocks
from compress.numerics.block_types import TYPES

ROPE = {"rope_type": "default", "rope_theta": 1e4}  # where a config does not say
BIASES = ("attention_bias", "mlp_bias")
DRAWN, SPREAD = 64, 0.02  # rows of a matrix of random numbers, and how far these spread
ROPE_TYPES = {"llama": ("default", "linear", "llama3"), "gemma3": ("default", "linear")}  # where not the default alone


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: what it is there, and how to read it when its turn comes.

    shape: of its bytes where it has a block type. block_type: one of llama.cpp's, whose bytes are read as they are.
    path: its name in the model, of a weight that of its module.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]
    block_type: str | None = None
    path: str = ""


@dataclass(frozen=True)
class Model:
    """What of a checkpoint's config goes into a GGUF file.

    architecture: llama.cpp's name for it. rope: the rotary parameters. mlp_widths: one a block, where they differ.
    """

    architecture: str
    config: Any
    rope: dict[str, Any]
    entries: list[Entry]
    mlp_widths: list[int] | None = None

    @classmethod
    def of(cls, architecture: str, config: Any, entries: list[Entry], mlp_widths: list[int] | None = None) -> "Model":
        rope = ROPE | rope_of(config)
        if rope["rope_type"] == "llama3":
            factors = llama3_factors(config)
            entries = [*entries, Entry(ROPE_FACTORS, factors.shape, factors.dtype, lambda: factors)]
        return cls(architecture, config, rope, entries, mlp_widths)


def read_model(folder: Path, types: Mapping[str, str]) -> Model:
    """A checkpoint, of whose weights only the biases have been read.

    types: the block types of the tensors that are stored as such, by path.
    Raises UnsupportedModel for a model that GGUF does not cover, CheckpointError for a folder that is damaged or
    incomplete.
    """
    config = load_config(folder)
    check_writable(config)
    widths, weights = mlp_widths(config), LazyWeights(folder)
    shapes = stored_shapes(config)
    config = getattr(config, "text_config", config)
    architecture = "deci" if widths else WRITTEN[config.model_type]
    known = ARCHITECTURES[architecture]
    quantized = {f"{path}.weight": f"{path}.qweight" for path in types}
    weights.check_against({name: shape for name, shape in shapes.items() if name not in quantized})
    biases = [name for name in shapes if name.endswith(".bias")]
    # A zero bias is no bias: a sliced Qwen2 written as Llama has some.
    if architecture in ("llama", "deci") and not any(bool(weights.read([name])[name].any()) for name in biases):
        shapes = {name: shape for name, shape in shapes.items() if name not in biases}
    names, entries = tensor_names(architecture, config.num_hidden_layers), []
    for name, shape in shapes.items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        # How many heads the rows of a query or key matrix, or its bias, are of.
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        heads = heads if known.interleaved else None
        if stored := quantized.get(name):
            size, read = torch.Size(weights.stored.tensors[stored].shape), partial(read_rows, weights, stored, heads)
            block_type = types[name.removesuffix(".weight")]
            entries.append(Entry(theirs, size, torch.uint8, partial(read, torch.uint8), block_type))
            continue
        dtype = written_dtype(shape, READABLE[weights.stored.tensors[str(weights.resolve(name))].dtype])
        added = 1.0 if known.norms_from_one and name.endswith("norm.weight") else 0.0
        entries.append(Entry(theirs, shape, dtype, partial(read_rows, weights, name, heads, dtype, added)))
    return Model.of(architecture, config, entries, widths)


def written_dtype(shape: torch.Size, dtype: torch.dtype) -> torch.dtype:
    """llama.cpp computes with norms and biases in float32; GGUF has float64 for none."""
    return torch.float32 if len(shape) == 1 or dtype == torch.float64 else dtype


def mlp_widths(config: Any) -> list[int] | None:
    """Of a checkpoint whose MLPs differ in width and which is stock but for that; None of any other."""
    others = any(getattr(config, name, None) for name in ("slicing", "factors", "storage"))
    widths: list[int] | None = None if others else getattr(config, "mlp_widths", None)
    return widths


def model_to_come(config: Any, dtype: torch.dtype) -> Model:
    """A model of this config, matrices in `dtype`, before there are weights to read. Raises UnsupportedModel."""
    check_writable(config)
    architecture, entries = WRITTEN[config.model_type], list[Entry]()
    names = tensor_names(architecture, config.num_hidden_layers)
    for name, shape in stored_shapes(config).items():
        theirs, kept = names.get_name(name, try_suffixes=(".weight", ".bias")), written_dtype(shape, dtype)
        read = partial(torch.empty, shape, dtype=kept)
        entries.append(Entry(theirs, shape, kept, read, path=name.removesuffix(".weight")))
    return Model.of(architecture, config, entries)


def drawn(entry: Entry, block_type: str | None) -> Entry:
    """A tensor to come, of random numbers: a matrix in its dtype or in a block type, the same rows again and again."""
    if not entry.path:  # not a weight
        return entry
    if len(entry.shape) == 1:
        return replace(entry, read=partial(torch.ones, entry.shape, dtype=entry.dtype))
    rows, columns = entry.shape

    def read() -> Tensor:
        some = torch.randn(min(rows, DRAWN), columns) * SPREAD
        if block_type is None:
            some = some.to(entry.dtype)
        else:
            some = fit_blocks(some, TYPES[block_type], trials=2).encoded(some)
        return some.repeat(-(-rows // len(some)), 1)[:rows]

    if block_type is None:
        return replace(entry, read=read)
    shape = torch.Size((rows, row_bytes(block_type, columns)))
    return replace(entry, shape=shape, dtype=torch.uint8, read=read, block_type=block_type)


def stored_shapes(config: Any) -> dict[str, torch.Size]:
    """The shapes of a model's parameters and buffers, a tied one once."""
    shapes = {name: parameter.shape for name, parameter in empty_model(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def read_rows(weights: LazyWeights, name: str, heads: int | None, dtype: torch.dtype, added: float = 0.0) -> Tensor:
    """A tensor, its rows in the file's order, with `added` where a norm's gain is stored as what it multiplies by."""
    tensor = weights.read([name])[name].to(dtype)
    tensor = tensor + added if added else tensor
    return tensor if heads is None else interleaved(tensor, heads)


def check_writable(config: Any) -> None:
    """Raises UnsupportedModel for the config of a model that no architecture of GGUF covers."""
    if reason := why_not_writable(config):
        raise UnsupportedModel(
            f"The model cannot be written as GGUF: {reason}. GGUF is written for {', '.join(sorted(WRITTEN))}. "
            "Leave GGUF out: transformers loads the folder without it."
        )


def why_not_writable(config: Any) -> str | None:
    """What of a config GGUF cannot say, if anything."""
    if mlp_widths(config):
        stock = config.text_config
        return why_not_writable(stock) if stock.model_type in DECI else "its MLPs differ in width"
    kind = config.model_type
    if kind not in WRITTEN:
        return f"its model_type is {kind!r}"
    architecture, expected = WRITTEN[kind], MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    if expected not in (config.architectures or [expected]):
        return f"its architecture is {', '.join(config.architectures)}, not {expected}"
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if {"swish": "silu"}.get(activation, activation) != (usual := ARCHITECTURES[architecture].activation):
        return f"its activation is {activation!r}, not {usual!r}"
    window = getattr(config, "sliding_window", None)
    says_windows = "attention.sliding_window" in ARCHITECTURES[architecture].keys
    if window is not None and window < config.max_position_embeddings and not says_windows:
        return f"its sliding window of {window} is less than its {config.max_position_embeddings} positions"
    allowed = {FULL: ROPE_TYPES.get(architecture, ("default",))}
    for blocks, kinds in (allowed | ({LOCAL: ("default",)} if ARCHITECTURES[architecture].local_rope else {})).items():
        rope = rope_of(config, blocks)
        if rope.get("rope_type", "default") not in kinds:
            return f"its rotary embeddings are scaled by {rope['rope_type']!r}, which is none of {', '.join(kinds)}"
        if rope.get("partial_rotary_factor") not in (None, 1.0):
            return f"it rotates only a part of each head (partial_rotary_factor {rope['partial_rotary_factor']})"
    return why_not_its_family(kind, ARCHITECTURES[architecture].biases, config)


WHOLE_HEADS = ("olmo2", "phi3", "starcoder2")  # whose loader has no size of a head


def why_not_its_family(kind: str, has_biases: bool, config: Any) -> str | None:
    """What llama.cpp takes for granted in a family and a config may say otherwise."""
    rules = [
        (
            hasattr(config, "query_pre_attn_scalar") and config.query_pre_attn_scalar != query_scale(config),
            "its queries are scaled by another number than llama.cpp's",
        ),
        (
            kind == "gemma3_text" and any((each == FULL) != (n % 6 == 5) for n, each in enumerate(config.layer_types)),
            "other blocks than each sixth are without a sliding window",
        ),
        (
            kind == "gemma3_text" and (config.use_bidirectional_attention or not config.sliding_window),
            "its attention is not causal, or has no sliding window",
        ),
        (kind == "gemma3_text" and config.attn_logit_softcapping is not None, "its attention scores have a soft cap"),
        (
            kind == "smollm3" and any(bool(each) != (n % 4 != 3) for n, each in enumerate(config.no_rope_layers)),
            "other blocks than each fourth are without rotary embeddings",
        ),
        (
            kind in ("olmo2", "phi3", "starcoder2")
            and head_size(config) * config.num_attention_heads != config.hidden_size,
            "its heads together are not as wide as the stream",
        ),
        (
            not config.tie_word_embeddings and tensor_names(WRITTEN[kind], 1).get_name("lm_head") is None,
            "its head has weights of its own, and llama.cpp takes the embeddings for it",
        ),
        (kind == "starcoder2" and not config.use_bias, "its linears have no biases"),
        (not has_biases and any(getattr(config, name, False) for name in BIASES), "its attention or MLP has biases"),
    ]
    return next((reason for broken, reason in rules if broken), None)


def head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
