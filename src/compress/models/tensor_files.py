"""The safetensors files of a checkpoint folder, and nothing else: an index can only name files of its own folder."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from compress.errors import CheckpointError
from compress.models.json_text import parse_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LARGEST_HEADER = 2**25  # bytes; a hundred thousand tensors take half of it
LONGEST_NAME = 255  # bytes that file systems allow
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, from its index where it has one."""
    index = folder / INDEX
    if index.is_file():
        files = [folder / name for name in indexed_names(index)]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise CheckpointError(f"{index} names {absent[0]}, which is not there. Complete the download.")
        return files
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickles = [file.name for pattern in PICKLES for file in sorted(folder.glob(pattern))]
    if pickles:
        raise CheckpointError(
            f"{folder} holds weights only as a pickle ({pickles[0]}), which can run code when it is opened. "
            "Convert it to safetensors: load it with transformers where you trust it, then save_pretrained()."
        )
    raise CheckpointError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}.")


def indexed_names(index: Path) -> list[str]:
    try:
        weight_map = parse_json(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        if not names or not all(isinstance(name, str) for name in names):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no safetensors index (a JSON object with a weight_map).") from error
    for name in names:
        if not is_own_name(name) or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} names {name!r}; an index may only name .safetensors files of its own folder."
            )
    return names


def is_own_name(name: Any) -> bool:
    """Whether what a file says is the name of another in the same folder, and nothing else."""
    is_name = isinstance(name, str) and name.isprintable() and len(name.encode()) <= LONGEST_NAME
    return is_name and Path(name).name == name and "\\" not in name


def open_safetensors(file: Path) -> safe_open:
    """That the header fits the file, safetensors itself checks."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
        if length > LARGEST_HEADER:
            raise CheckpointError(f"{file} is damaged: its header claims {length:,} bytes. Download or write it again.")
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged ({error}). Download or write it again.") from error
