"""The adapter beside a checkpoint: a plain LoRA folder, as PEFT and vLLM read it.

Its scale is 1 (lora_alpha is the rank), so that what it adds is B A x and nothing else.
"""

import json
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.checkpoints.files import write_json
from compress.io import atomic_write, new_file_mode
from compress.models.tensor_files import ADAPTER

WEIGHTS = "adapter_model.safetensors"
COPY_BYTES = 2**24


def adapter_config(base: str, ranks: Mapping[str, int], modules: Iterable[str] = ()) -> dict[str, Any]:
    """
    base: what the adapter is for, as a user would name it. ranks: by the linear's path. modules: all of the model's.
    """
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    unlike = {path: rank for path, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": unlike,
        "alpha_pattern": unlike,
        "target_modules": target_modules(list(ranks), set(modules) - ranks.keys()),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }


def target_modules(paths: Sequence[str], others: Collection[str]) -> list[str]:
    """What PEFT and vLLM find the linears by in every block: the shortest ends of their paths that no other module has.

    Those are their last names, but where others are named so that have no adapter, or are no linears.
    """
    ends: set[str] = set()
    for depth in range(1, 1 + max(path.count(".") + 1 for path in paths)):
        ends = {".".join(path.split(".")[-depth:]) for path in paths}
        if not any(f".{other}".endswith(f".{end}") for other in others for end in ends):
            break
    return sorted(ends)


def write_adapter(target: Path, parts: Sequence[Path], config: Mapping[str, Any]) -> Path:
    """The folder, from safetensors files that hold parts of the adapter's tensors; returns its weights' file.

    Nothing is held in memory.
    """
    folder = target / ADAPTER
    folder.mkdir(exist_ok=True)
    write_json(folder / "adapter_config.json", config)
    with atomic_write(folder / WEIGHTS) as unfinished:
        join(parts, unfinished)
        unfinished.chmod(new_file_mode())
    return folder / WEIGHTS


def join(parts: Sequence[Path], joined: Path) -> None:
    """One safetensors file of several: their headers with the places moved, then their data one behind the other."""
    header, start = {"__metadata__": {"format": "pt"}}, 0
    data: list[tuple[Path, int]] = []
    for part in parts:
        with part.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            entries: dict[str, Any] = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            header[name] = entry | {"data_offsets": [start + begin, start + end]}
        start += part.stat().st_size - 8 - length
        data.append((part, 8 + length))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with joined.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for part, offset in data:
            with part.open("rb") as source:
                source.seek(offset)
                while block := source.read(COPY_BYTES):
                    file.write(block)
