"""The files of a checkpoint beside its weights."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from compress.models import configuration_sliced
from compress.models.tensor_files import INDEX

# Copied as files: loading and saving them again would rewrite what other tools read from them.
COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


def part_file(index: int, num_parts: int) -> str:
    return f"model-{index + 1:05d}-of-{num_parts:05d}.safetensors"


def adapter_file(index: int) -> str:
    """A part's share of the adapter, until all are put together."""
    return f"adapter-{index + 1:05d}.safetensors"


def copy_companions(source: Path, target: Path) -> None:
    """Tokenizer, chat template, generation config and licence, byte for byte."""
    for pattern in COPIED:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def carry_modeling(target: Path, modules: Iterable[str]) -> None:
    """The modeling files, so that the checkpoint loads with trust_remote_code and without this package."""
    models = Path(configuration_sliced.__file__).parent
    for module in modules:
        shutil.copyfile(models / f"{module}.py", target / f"{module}.py")


def write_index(target: Path, parts: Iterable[Mapping[str, Any]]) -> None:
    """model.safetensors.index.json over the part files: which tensor is where, and the totals."""
    weight_map: dict[str, str] = {}
    total_bytes = total_parameters = 0
    for part in parts:
        weight_map |= dict.fromkeys(part["tensors"], part["part"]["file"])
        total_bytes += part["tensor_bytes"]
        total_parameters += part["parameters"]
    metadata = {"total_size": total_bytes, "total_parameters": total_parameters}
    write_json(target / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def write_json(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
