"""A finished checkpoint as one GGUF file, which llama.cpp and the programs built on it load.

For the families of `models/gguf_header.ARCHITECTURES`, sliced or not: widths, head size and head counts are stated one
by one. What the file could not say is refused before anything is written, or before the model is compressed
(`check_exportable`). The weights pass through memory one tensor at a time.

The package `gguf` (the extra of that name) knows the format, the names of tensors and the special tokens; the rest
follows the specification of GGUF (ggml, docs/gguf.md) and llama.cpp's own converter.

    model.py       the tensors
    tokenizer.py   the tokenizer
    container.py   the file, by gguf's writer

That the file reads back as its folder is proved by checkpoints/verify.py.
"""

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compress.checkpoints.files import copy_companions, write_json
from compress.checkpoints.gguf.model import check_writable, drawn, model_to_come, read_model
from compress.checkpoints.gguf.tokenizer import Vocabulary, read_vocabulary
from compress.checkpoints.verify import verify_gguf
from compress.errors import CompressError, OutputError
from compress.io import atomic_write
from compress.models.gguf_header import ALIGNMENT, ROPE_FACTORS, read_header
from compress.models.gguf_weights import check_extra

IN_TRANSFORMERS = ("llama", "qwen2", "phi3", "starcoder2")  # architectures that its reader (5.23) reads alike

__all__ = ["bytes_beside", "check_exportable", "reader_notes", "verify_gguf", "write_drawn", "write_gguf"]


def write_gguf(
    folder: Path, file: Path, *, name: str | None = None, types: Mapping[str, str] | None = None, file_type: str = ""
) -> None:
    """The checkpoint `folder` as `file`, which is there whole or not at all and replaces what was there.

    Weights keep their dtype (float64 becomes float32), norms and biases are float32. Biases that are all zero are left
    out.
    name: what the file calls the model, the folder's name by default. types: the block types of tensors that are stored
    as such, by path. file_type: the file's, such as Q4_K_M; by default its largest tensor's.
    Raises what `check_exportable` does, CheckpointError or NumericalError for a damaged folder, and OutputError when
    the disk is full or may not be written.
    """
    check_extra("Writing")
    from compress.checkpoints.gguf.container import write_container

    model = read_model(folder, types or {})
    vocabulary = read_vocabulary(folder, model.config)
    try:
        with atomic_write(file) as unfinished:
            write_container(unfinished, model, vocabulary, name or folder.resolve().name, file_type)
    except OSError as error:
        raise OutputError(f"{file} cannot be written ({error}). Free space or choose another folder.") from error


def check_exportable(config: Any, folder: Path) -> None:
    """That a checkpoint to come, of this config and with the tokenizer that is in `folder`, can be written as GGUF.

    config: of what will be written, not of the dense model.
    Raises UsageError without the extra, UnsupportedModel for what a file cannot say, and CheckpointError for a folder
    without a tokenizer or with another model's.
    """
    check_extra("Writing")
    check_writable(config)
    vocabulary_to_come(config, folder)


def bytes_beside(config: Any, folder: Path, apart: Collection[str], *, name: str, dtype: torch.dtype) -> int:
    """Bytes of a quantized file to come without the matrices `apart`, by path: all else in `dtype`, header and gaps.

    config, folder: as `check_exportable` has them. name: as the file calls the model. Exact, unless biases are left out
    because they are zero.
    """
    from compress.checkpoints.gguf.container import header_bytes

    model = model_to_come(config, dtype)
    beside = [entry for entry in model.entries if entry.path not in apart]
    tensors = sum(-(-entry.shape.numel() * entry.dtype.itemsize // ALIGNMENT) * ALIGNMENT for entry in beside)
    return header_bytes(model, vocabulary_to_come(config, folder), name) + tensors


def write_drawn(config: Any, folder: Path, file: Path, *, types: Mapping[str, str], dtype: torch.dtype) -> None:
    """A file as that of a checkpoint to come, with random numbers for weights: it takes as long to run.

    config, folder: as `check_exportable` has them. types: as `write_gguf` has them; all else is in `dtype`.
    """
    from compress.checkpoints.gguf.container import write_container

    model = model_to_come(config, dtype)
    model = replace(model, entries=[drawn(entry, types.get(entry.path)) for entry in model.entries])
    write_container(file, model, vocabulary_to_come(config, folder), "drawn", "Q8_0")


def vocabulary_to_come(config: Any, folder: Path) -> Vocabulary:
    """Of a checkpoint of that config with the tokenizer that is in `folder`."""
    # transformers chooses the tokenizer's class by the config beside it, and that is going to be another one.
    with tempfile.TemporaryDirectory() as scratch:
        to_come = Path(scratch)
        copy_companions(folder, to_come)
        write_json(to_come / "config.json", config.to_diff_dict())
        try:
            return read_vocabulary(to_come, config)
        except CompressError as error:
            raise type(error)(str(error).replace(str(to_come), str(folder))) from error


def reader_notes(file: Path) -> list[str]:
    """What to know of the readers of a written GGUF file, a sentence each; nothing if all read it alike."""
    header = read_header(file)
    architecture = header.fields["general.architecture"]
    if architecture not in IN_TRANSFORMERS:
        return [
            f"transformers' reader of GGUF makes no {architecture} model, or another; llama.cpp and compress read it."
        ]
    if architecture != "llama":
        return []
    biases = {name: tensor.shape for name, tensor in header.tensors.items() if name.endswith(".bias")}
    scaling = header.fields.get("llama.rope.scaling.type", "llama3" if ROPE_FACTORS in header.tensors else None)
    left_out = [("biases", "them")] if biases else []
    left_out += [(f"rotary scaling {scaling!r}", "it")] if scaling else []
    notes = [
        f"transformers' reader of GGUF leaves out the {what}; llama.cpp reads {pronoun}." for what, pronoun in left_out
    ]
    # llama.cpp took the hidden size for their width until its pull request 21245 (create_tensor_qkv).
    queries = biases.get("blk.0.attn_q.bias")
    if queries is not None and queries[0] != header.fields["llama.embedding_length"]:
        notes.append(
            "llama.cpp from before April 2026 does not load the file, because its query biases have another width than "
            "the model."
        )
    return notes
