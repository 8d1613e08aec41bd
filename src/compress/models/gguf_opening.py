"""A GGUF file as a model of transformers, its weights dequantized.

transformers' reader leaves out what its own classes have no place for, biases and scaled rotary embeddings among it,
and says nothing. Such a file is refused: it would be another model that is looked at. The package `gguf` (the extra of
that name) reads the file's header.
"""

import importlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from compress.errors import CheckpointError, UnsupportedModel, UsageError
from compress.models.counting import num_parameters
from compress.models.libraries import reading
from compress.models.loading import check_sizes

ROPE_FACTORS = "rope_freqs.weight"
FOLDER_INSTEAD = "Name the folder it was written from: the weights are the same."


def load_gguf_config(file: Path) -> Any:
    """What transformers makes of the file's header. Raises UnsupportedModel for an architecture it does not know."""
    try:
        importlib.import_module("gguf")
    except ImportError as error:
        raise UsageError("Reading GGUF needs the package gguf: pip install compress-llm[gguf]") from error
    with alone(file) as folder, reading(f"transformers cannot read {file}", kind=UnsupportedModel):
        config = AutoConfig.from_pretrained(folder, gguf_file=file.name, local_files_only=True)
    check_sizes(file, config)
    check_rotary(file, config)
    return config


def load_gguf_tokenizer(file: Path) -> Any:
    said = f"transformers cannot read the tokenizer of {file}"
    with alone(file) as folder, reading(said, kind=UnsupportedModel):
        return AutoTokenizer.from_pretrained(folder, gguf_file=file.name, local_files_only=True)


def load_gguf(file: Path, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The whole model. Raises UnsupportedModel where some of the file has no place in it."""
    load_gguf_config(file)  # whose sizes are looked at there
    with alone(file) as folder, reading(f"transformers cannot read {file}", kind=UnsupportedModel):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file.name, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    model, info = loaded
    for kind in ("missing_keys", "mismatched_keys"):
        if info[kind]:
            first = min(map(str, info[kind]))
            raise CheckpointError(f"{file} makes no whole model: {first} is {kind.partition('_')[0]}. Write it again.")
    stored = sum(int(tensor.n_elements) for tensor in read(file).tensors if tensor.name != ROPE_FACTORS)
    if stored != num_parameters(model):
        raise UnsupportedModel(
            f"transformers' reader of GGUF leaves out some of {file}: of {stored:,} numbers it takes "
            f"{num_parameters(model):,}. {FOLDER_INSTEAD}"
        )
    ready: PreTrainedModel = model.to(device).eval()
    return ready


def check_rotary(file: Path, config: Any) -> None:
    """That a scaling of the rotary embeddings was read."""
    reader = read(file)
    said = [name for name in reader.fields if name.endswith(".rope.scaling.type")]
    scaled = any(reader.fields[name].contents() != "none" for name in said)
    factors = any(tensor.name == ROPE_FACTORS for tensor in reader.tensors)
    rope = getattr(config, "rope_parameters", None) or {}
    if (scaled or factors) and rope.get("rope_type", "default") == "default":
        raise UnsupportedModel(
            f"transformers' reader of GGUF leaves out the scaled rotary embeddings of {file}. {FOLDER_INSTEAD}"
        )


def read(file: Path) -> Any:
    """The header; tensors stay on disk."""
    import gguf

    with reading(f"{file} is no GGUF file or damaged", "Get it again."):
        return gguf.GGUFReader(file)


@contextmanager
def alone(file: Path) -> Iterator[Path]:
    """A folder with only that file: transformers also reads what lies beside it."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / file.name).symlink_to(file.resolve())
        yield Path(scratch)
