"""Read a GGUF file like a model's folder: weights by transformers' names, dequantized, and a folder that stands for it.

llama.cpp's converter changes some weights: rows of Llama's queries and keys are interleaved, Gemma's norms have one
added. Here they are as they were. The folder has a link to the file, and what else a model's folder has, made from the
header: whatever reads a model's folder reads it. The package `gguf` (the extra of that name) dequantizes.
"""

import atexit
import importlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from compress.errors import CheckpointError, UnsupportedModel, UsageError
from compress.io import GGUF, version_of
from compress.models.gguf_header import (
    FOLDER_INSTEAD,
    ROPE_FACTORS,
    GgufTensor,
    Header,
    architecture_of,
    read_config,
    read_header,
    tensor_names,
)
from compress.models.loading import empty_model
from compress.models.untrusted import reading

CHUNK = 2**22  # numbers that are dequantized at a time
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # of tensors that are not quantized


@dataclass(frozen=True)
class GgufWeight:
    """A weight that is read when it is indexed, by its rows; a vector's rows are its numbers.

    order: where in the file each row is; None where it is in its place. from_one: whether one has been added.
    """

    header: Header
    stored: GgufTensor
    order: Tensor | None
    from_one: bool

    def get_shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def get_dtype(self) -> str:
        """As safetensors call it. float32 also for what is quantized, and where one is taken away again."""
        return self.stored.kind if self.stored.kind in DTYPES and not self.from_one else "F32"

    def __getitem__(self, index: slice) -> Tensor:
        stored = self.stored
        places = (torch.arange(stored.shape[0]) if self.order is None else self.order)[index]
        if len(stored.shape) == 1:
            numbers = decoded(self.header.read_rows(stored, 0, 1).copy(), stored.kind)[0, places]
            return numbers.float() - 1 if self.from_one else numbers
        found = torch.empty(len(places), *stored.shape[1:], dtype=DTYPES[self.get_dtype()])
        step = max(1, CHUNK // stored.shape[-1])
        for begin in range(0, len(places), step):
            some = places[begin : begin + step]
            first, last = int(some.min()), int(some.max()) + 1
            rows = self.header.read_rows(stored, first, last)[(some - first).numpy()]
            found[begin : begin + step] = decoded(rows, stored.kind)
        return found


@dataclass(frozen=True)
class GgufModel:
    """What safetensors' `safe_open` is to one of theirs; nothing is held open.

    weights: by their names in the model. config: its `architectures` name the model's class.
    """

    header: Header
    config: Any
    weights: dict[str, GgufWeight]

    def keys(self) -> list[str]:
        return list(self.weights)

    def get_slice(self, name: str) -> GgufWeight:
        return self.weights[name]

    def get_tensor(self, name: str) -> Tensor:
        return self.weights[name][:]


def gguf_model(file: Path) -> GgufModel:
    """What the header says, read once for each version of the file.

    Raises UnsupportedModel for what is not read, CheckpointError for a damaged file.
    """
    return read_model(file, version_of(file))


@lru_cache(maxsize=4)
def read_model(file: Path, _version: tuple[int, ...]) -> GgufModel:
    header = read_header(file)
    config = read_config(header)
    model = empty_model(config)
    config.architectures = [type(model).__name__]
    names = tensor_names(header.fields["general.architecture"], config.get_text_config().num_hidden_layers)
    weights = {}
    for name, parameter in model.state_dict().items():
        if name != "lm_head.weight":
            theirs = str(names.get_name(name, try_suffixes=(".weight", ".bias")))
        elif not config.tie_word_embeddings:
            theirs = "output.weight"  # which the name map does not have for Gemma
        else:
            continue
        weights[name] = weight_of(header, config, tuple(parameter.shape), theirs)
    stray = header.tensors.keys() - {weight.stored.name for weight in weights.values()} - {ROPE_FACTORS}
    if stray:
        raise UnsupportedModel(
            f"{file} has {min(stray)!r}, which has no place in a {config.architectures[0]}. {FOLDER_INSTEAD}"
        )
    return GgufModel(header, config, weights)


def weight_of(header: Header, config: Any, shape: tuple[int, ...], theirs: str) -> GgufWeight:
    file, stored, known = header.file, header.tensors.get(theirs), architecture_of(header)
    if stored is None:
        raise CheckpointError(f"{file} lacks {theirs!r}. Get it again.")
    if stored.shape != shape:
        raise CheckpointError(
            f"{file} has {theirs!r} of {list(stored.shape)}, its header says {list(shape)}. Get it again."
        )
    try:
        decoded(np.zeros((1, stored.row_bytes), np.uint8), stored.kind)
    except NotImplementedError as error:
        raise UnsupportedModel(
            f"{file} has {theirs!r} in the type {stored.kind}, which the package gguf does not dequantize."
        ) from error
    config = config.get_text_config()
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs.split(".")[-2])
    order = interleaved(torch.arange(shape[0]), heads).argsort() if known.interleaved and heads else None
    return GgufWeight(header, stored, order, known.norms_from_one and theirs.endswith("norm.weight"))


def interleaved(tensor: Shaped[Tensor, "rows *columns"], heads: int) -> Shaped[Tensor, "rows *columns"]:
    """The rows of a query or key matrix, or its bias, in the order in which llama.cpp rotates them.

    Row i of a head is rotated with row i + half in transformers; there the two follow each other.
    """
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def decoded(rows: np.ndarray, kind: str) -> Tensor:
    import gguf

    if kind in DTYPES:
        return torch.from_numpy(rows).view(DTYPES[kind])
    with np.errstate(all="ignore"):  # what is no number is found where it is used
        return torch.from_numpy(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind]))


# How a byte-level BPE cuts text before it merges, by llama.cpp's names, where transformers reads it as it was.
CUTS = {
    *("gpt-2", "smollm", "llama3", "llama-v3", "llama-bpe", "smaug-bpe", "dbrx", "falcon3"),
    *("qwen2", "deepseek-r1-qwen", "tekken", "gpt-4o"),
}


def check_extra(what: str) -> None:
    """Raises UsageError where the package gguf is missing. what: for what it is needed, such as Reading."""
    try:
        importlib.import_module("gguf")
    except ImportError as error:
        raise UsageError(f"{what} GGUF needs the package gguf: pip install compress-llm[gguf]") from error


def gguf_folder(file: Path) -> Path:
    """Return the folder that stands for a file, made once in this process and deleted at its end.

    Raises UnsupportedModel for a model or tokenizer that is not read, CheckpointError for a damaged file.
    """
    check_extra("Reading")
    return made_folder(file.absolute(), version_of(file))


@cache
def made_folder(file: Path, _version: tuple[int, ...]) -> Path:
    model, tokenizer = gguf_model(file), load_gguf_tokenizer(file)
    scratch = tempfile.mkdtemp(prefix="compress-gguf-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    folder = Path(scratch) / file.stem  # which is what messages call it
    with reading(f"No folder can be made from the header of {file}"):
        folder.mkdir()
        (folder / GGUF).symlink_to(file)
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        origin = {"license": model.header.fields.get("general.license")}
        (folder / "README.md").write_text(f"---\n{json.dumps(origin)}\n---\n", encoding="utf-8")
    return folder


def load_gguf_tokenizer(file: Path) -> Any:
    """Load the tokenizer, by transformers' reader. Raises UnsupportedModel where it would cut text in another way."""
    header = read_header(file)
    cut = header.fields.get("tokenizer.ggml.pre")
    if header.fields.get("tokenizer.ggml.model") == "gpt2" and cut not in CUTS:
        raise UnsupportedModel(
            f"The tokenizer of {file} cuts text in a way ({cut!r}) that transformers does not read from GGUF. "
            f"{FOLDER_INSTEAD}"
        )
    with (
        tempfile.TemporaryDirectory() as scratch,
        reading(f"transformers cannot read the tokenizer of {file}", kind=UnsupportedModel),
    ):
        # Alone in a folder: transformers also reads what lies beside it.
        (Path(scratch) / GGUF).symlink_to(file.resolve())
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(scratch, gguf_file=GGUF, local_files_only=True)
    if cut == "smollm":
        digits, usual = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, usual])
    return tokenizer
