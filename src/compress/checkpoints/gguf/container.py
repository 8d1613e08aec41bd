"""The file itself, by gguf's writer. Imported only where the package gguf is known to be."""

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch

from compress.checkpoints.gguf.model import Model, head_size
from compress.checkpoints.gguf.tokenizer import Vocabulary
from compress.models.gguf_header import ALIGNMENT, ARCHITECTURES, HEAD_SIZES, LOCAL, LOCAL_BASE, rope_of

TENSOR_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FILE_TYPES = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}


class Writer(gguf.GGUFWriter):
    """Also writes empty arrays: llama.cpp wants a list of merges even of a tokenizer that merges none."""

    def _pack_val(self, val: Any, vtype: Any, *options: Any, **named: Any) -> bytes:
        if vtype == gguf.GGUFValueType.ARRAY and len(val) == 0:
            kinds = [self._pack("I", kind) for kind in (gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING)]
            return b"".join([*kinds, self._pack("Q", 0)])
        packed: bytes = super()._pack_val(val, vtype, *options, **named)
        return packed


def write_container(file: Path, model: Model, vocabulary: Vocabulary, name: str, file_type: str) -> None:
    """Raises OSError when the file cannot be written; what there is of it then is the caller's to delete."""
    writer = write_header(file, model, vocabulary, name, file_type)
    try:
        for entry in model.entries:
            tensor = entry.read().contiguous()
            # numpy has no bfloat16; its bits are written.
            writer.write_tensor_data((tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy())
            del tensor  # before the next is read
        writer.close()
    finally:
        # After an error, what a full disk says again on closing is known.
        with suppress(OSError):
            writer.close()


def write_header(file: Path, model: Model, vocabulary: Vocabulary, name: str, file_type: str) -> Writer:
    """The writer, all before the tensors written. Raises OSError."""
    writer = Writer(file, model.architecture)
    try:
        describe_model(writer, model, name, file_type)
        describe_vocabulary(writer, vocabulary)
        for entry in model.entries:
            kind = gguf.GGMLQuantizationType[entry.block_type or TENSOR_TYPES[entry.dtype]]
            nbytes = entry.shape.numel() * entry.dtype.itemsize
            # The type as numpy's, which has no bfloat16; that of bytes says that the shape is theirs.
            shown: Any = numpy.dtype("uint8") if entry.block_type else None
            writer.add_tensor_info(entry.name, tuple(entry.shape), shown, nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    except BaseException:
        with suppress(OSError):
            writer.close()
        raise
    return writer


def header_bytes(model: Model, vocabulary: Vocabulary, name: str) -> int:
    """Bytes before the first tensor of a quantized file; types of its tensors do not change them."""
    with tempfile.NamedTemporaryFile(suffix=".gguf") as scratch:
        writer = write_header(Path(scratch.name), model, vocabulary, name, "Q8_0")
        writer.close()
        return -(-Path(scratch.name).stat().st_size // ALIGNMENT) * ALIGNMENT


def describe_model(writer: Writer, model: Model, name: str, file_type: str) -> None:
    config = model.config
    # transformers takes a model of this very name for its class Mistral, which its reader then does not know.
    writer.add_name("Mistral" if name == "mistral" else name)
    writer.add_type(gguf.GGUFType.MODEL)
    largest = max(model.entries, key=lambda entry: entry.shape.numel())  # of a dtype as most weights
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{file_type}" if file_type else FILE_TYPES[largest.dtype]])
    if file_type:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    known = ARCHITECTURES[model.architecture]
    values = {key: getattr(config, name, None) for key, name in known.all_keys.items()}
    values |= dict.fromkeys(("attention.key_length", *HEAD_SIZES), head_size(config))
    values["rope.freq_base"] = float(model.rope["rope_theta"])
    if known.local_rope:
        values[LOCAL_BASE] = float(rope_of(config, LOCAL)["rope_theta"])
    if model.mlp_widths:
        values["feed_forward_length"] = model.mlp_widths
    for key, value in values.items():
        if value is not None:
            if isinstance(value, list):
                writer.add_array(f"{model.architecture}.{key}", value)
            elif isinstance(value, float) or key.endswith("scale"):  # multipliers also where a config has whole numbers
                writer.add_float32(f"{model.architecture}.{key}", float(value))
            else:
                writer.add_uint32(f"{model.architecture}.{key}", value)
    if model.rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(model.rope["factor"]))


def describe_vocabulary(writer: Writer, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.cut)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.prefixed)
    # SentencePiece's merges too: llama.cpp has the scores, transformers would have to guess the merges from them.
    if not vocabulary.special.merges:
        writer.add_key_value("tokenizer.ggml.merges", [], gguf.GGUFValueType.ARRAY)
    vocabulary.special.add_to_gguf(writer, quiet=True)
