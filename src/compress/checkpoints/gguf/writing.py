"""A folder as a GGUF file, there whole or not at all; and whether a folder to come can be one."""

import importlib
import tempfile
from pathlib import Path
from typing import Any

from compress.checkpoints.files import copy_companions, write_json
from compress.checkpoints.gguf.llama import Model, check_llama
from compress.checkpoints.gguf.vocabulary import read_vocabulary
from compress.durable import whole
from compress.errors import CompressError, OutputError, UsageError


def write_gguf(folder: Path, file: Path, *, name: str | None = None) -> None:
    """The checkpoint `folder` as `file`, which is there whole or not at all and replaces what was there.

    Weights keep their dtype (float64 becomes float32), norms and biases are float32. Biases that are all zero are left
    out.
    name: what the file calls the model, the folder's name by default.
    Raises what `check_exportable` does, CheckpointError or NumericalError for a damaged folder, and OutputError when
    the disk is full or may not be written.
    """
    check_extra()
    from compress.checkpoints.gguf.container import write_container

    model = Model(folder)
    vocabulary = read_vocabulary(folder, model.config)
    try:
        with whole(file) as unfinished:
            write_container(unfinished, model, vocabulary, name or folder.resolve().name)
    except OSError as error:
        raise OutputError(f"{file} cannot be written ({error}). Free space or choose another folder.") from error


def check_exportable(config: Any, folder: Path) -> None:
    """That a checkpoint to come, of this config and with the tokenizer that is in `folder`, can be written as GGUF.

    config: of what will be written, not of the dense model.
    Raises UsageError without the extra, UnsupportedModel for what a file cannot say, and CheckpointError for a folder
    without a tokenizer or with another model's.
    """
    check_extra()
    check_llama(config)
    # transformers chooses the tokenizer's class by the config beside it, and that is going to be another one.
    with tempfile.TemporaryDirectory() as scratch:
        to_come = Path(scratch)
        copy_companions(folder, to_come)
        write_json(to_come / "config.json", config.to_diff_dict())
        try:
            read_vocabulary(to_come, config)
        except CompressError as error:
            raise type(error)(str(error).replace(str(to_come), str(folder))) from error


def check_extra() -> None:
    try:
        importlib.import_module("gguf")
    except ImportError as error:
        raise UsageError("Writing GGUF needs the package gguf: pip install compress-llm[gguf]") from error
