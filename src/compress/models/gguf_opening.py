"""Load a GGUF file as a transformers model, its weights dequantized.

transformers' reader leaves out what its own classes have no place for, biases and scaled rotary embeddings among it,
and says nothing. Such a file is refused: it would be another model that is looked at. The package `gguf` (the extra of
that name) reads the file's header.
"""

import importlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from compress.errors import CheckpointError, UnsupportedModel, UsageError
from compress.models.loading import check_sizes
from compress.models.storage import num_parameters
from compress.models.untrusted import reading

ROPE_FACTORS = "rope_freqs.weight"  # by what the rotary frequencies are divided
FOLDER_INSTEAD = "Name the folder it was written from: the weights are the same."


def check_extra(what: str) -> None:
    """Raises UsageError where the package gguf is missing. what: for what it is needed, such as Reading."""
    try:
        importlib.import_module("gguf")
    except ImportError as error:
        raise UsageError(f"{what} GGUF needs the package gguf: pip install compress-llm[gguf]") from error


def load_gguf_config(file: Path) -> Any:
    """Read the config from the file's header, through transformers.

    Raises UnsupportedModel for an architecture that it does not know, and for rotary scaling, which it leaves out.
    """
    check_extra("Reading")
    config = read_alone(AutoConfig, file)
    check_sizes(file, config)
    rope = getattr(config, "rope_parameters", None) or {}
    if rotary_scaling(read_header(file)) is not None and rope.get("rope_type", "default") == "default":
        raise UnsupportedModel(
            f"transformers' reader of GGUF leaves out the scaled rotary embeddings of {file}. {FOLDER_INSTEAD}"
        )
    return config


def load_gguf_tokenizer(file: Path) -> Any:
    return read_alone(AutoTokenizer, file)


def load_gguf(file: Path, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load the whole model. Raises UnsupportedModel where a tensor of the file has no place in it."""
    load_gguf_config(file)  # whose sizes are looked at there
    model, info = read_alone(AutoModelForCausalLM, file, dtype=dtype, output_loading_info=True)
    for kind in ("missing_keys", "mismatched_keys"):
        if info[kind]:
            first = min(map(str, info[kind]))
            raise CheckpointError(f"{file} makes no whole model: {first} is {kind.partition('_')[0]}. Write it again.")
    stored = sum(int(tensor.n_elements) for tensor in read_header(file).tensors if tensor.name != ROPE_FACTORS)
    if stored != num_parameters(model):
        raise UnsupportedModel(
            f"transformers' reader of GGUF leaves out some of {file}: of {stored:,} numbers it takes "
            f"{num_parameters(model):,}. {FOLDER_INSTEAD}"
        )
    ready: PreTrainedModel = model.to(device).eval()
    return ready


def read_alone(kind: Any, file: Path, **options: Any) -> Any:
    """Call `kind.from_pretrained` on the file alone in a folder: transformers also reads files next to it.

    Raises UnsupportedModel for whatever transformers raises.
    """
    what = f"the tokenizer of {file}" if kind is AutoTokenizer else str(file)
    with tempfile.TemporaryDirectory() as scratch, reading(f"transformers cannot read {what}", kind=UnsupportedModel):
        (Path(scratch) / file.name).symlink_to(file.resolve())
        return kind.from_pretrained(scratch, gguf_file=file.name, local_files_only=True, **options)


def read_header(file: Path) -> Any:
    """Open gguf's GGUFReader, which leaves tensors on disk. Raises CheckpointError for a damaged file."""
    import gguf

    with reading(f"{file} is no GGUF file or damaged", "Get it again."):
        return gguf.GGUFReader(file)


def rotary_scaling(header: Any) -> str | None:
    """Read how the rotary embeddings are scaled, if they are."""
    said = (field.contents() for name, field in header.fields.items() if name.endswith(".rope.scaling.type"))
    factors = any(tensor.name == ROPE_FACTORS for tensor in header.tensors)
    return next((kind for kind in said if kind != "none"), "llama3" if factors else None)
