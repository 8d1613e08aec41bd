"""The files of a checkpoint beside its weights."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress import own_model
from compress.errors import CheckpointError, VerificationError
from compress.models.tensor_files import INDEX

CARRIED = [Path(own_model.__file__).with_name(f"{kind}_compress.py") for kind in ("configuration", "modeling")]

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


def companions(source: Path) -> list[Path]:
    """Tokenizer, chat template, generation config and license.

    Raises CheckpointError for a link that leads elsewhere: what is copied from there would be published with the rest.
    """
    found = [file for pattern in COPIED for file in sorted(source.glob(pattern)) if file.is_file()]
    stray = next((file for file in found if not stays_in(source, file)), None)
    if stray is not None:
        raise CheckpointError(
            f"{stray} is a link to {stray.resolve()}, outside of the model. Put the file itself in its place."
        )
    return found


def stays_in(folder: Path, file: Path) -> bool:
    """Whether a file lies in its folder. That of a snapshot in the hub's cache is a link to the blobs beside it."""
    root, place = folder.resolve(), file.resolve()
    blobs = root.parents[1] / "blobs" if root.parent.name == "snapshots" else root
    return place.is_relative_to(root) or place.is_relative_to(blobs)


def copy_companions(source: Path, target: Path) -> None:
    """Byte for byte."""
    for file in companions(source):
        shutil.copyfile(file, target / file.name)


def carry_modeling(target: Path) -> None:
    """The modeling files, so that the checkpoint loads with trust_remote_code and without this package."""
    for file in CARRIED:
        shutil.copyfile(file, target / file.name)


def check_code(folder: Path, auto_map: Any) -> None:
    """That the code of a checkpoint, and what its config names of it, is this package's own, byte for byte.

    Raises VerificationError: nothing else is run to prove what was written.
    """
    named = auto_map.values() if isinstance(auto_map, dict) else []
    wanted, ours = {f"{str(name).partition('.')[0]}.py" for name in named}, {file.name: file for file in CARRIED}
    for name in sorted(wanted | {file.name for file in folder.glob("*.py")}):
        file, own = folder / name, ours.get(name)
        if own is None or not file.is_file() or file.read_bytes() != own.read_bytes():
            raise VerificationError(
                f"{file} is not the code that was carried into the checkpoint, so it is not run. "
                "Take it away, and write the checkpoint again with --resume."
            )


def write_index(target: Path, weight_map: Mapping[str, str], *, total_bytes: int, total_parameters: int) -> None:
    """
    weight_map: the file of each tensor.
    """
    metadata = {"total_size": total_bytes, "total_parameters": total_parameters}
    write_json(target / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def write_json(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
