"""A folder that stands for a GGUF file: a link to it, and what else a model's folder has, made from its header.

Whatever reads a model's folder reads it: config.json and the tokenizer are files there, and `models/tensor_files.py`
reads the weights through the link. The package `gguf` (the extra of that name) dequantizes them.
"""

import atexit
import importlib
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from compress.errors import UnsupportedModel, UsageError
from compress.models.gguf_header import FOLDER_INSTEAD, read_header
from compress.models.gguf_weights import gguf_model
from compress.models.tensor_files import GGUF, version_of
from compress.models.untrusted import reading

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
