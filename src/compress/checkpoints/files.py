"""The files of a checkpoint beside its weights: index, tokenizer, license, code, and the folder of its adapter.

The adapter is a plain LoRA, as PEFT and vLLM read it. Its scale is 1 (lora_alpha is the rank), so that what it adds is
B A x and nothing else.
"""

import json
import shutil
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress import own_model
from compress.errors import CheckpointError, VerificationError
from compress.io import atomic_write, new_file_mode
from compress.models.tensor_files import ADAPTER, INDEX

CARRIED = [Path(own_model.__file__).with_name(f"{kind}_compress.py") for kind in ("configuration", "modeling")]

# Copied as files: loading and saving them again would rewrite what other tools read from them.
COPIED = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model"),
    *("chat_template*", "generation_config.json", "LICENSE*", "NOTICE*"),
)
ADAPTER_WEIGHTS = f"{ADAPTER}/adapter_model.safetensors"
COPY_BYTES = 2**24


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
    root = source.resolve()
    # The files of a snapshot in the hub's cache are links to the blobs beside it.
    allowed = (root, root.parents[1] / "blobs") if root.parent.name == "snapshots" else (root,)
    for file in found:
        if not any(file.resolve().is_relative_to(folder) for folder in allowed):
            raise CheckpointError(
                f"{file} is a link to {file.resolve()}, outside of the model. Put the file itself in its place."
            )
    return found


def copy_companions(source: Path, target: Path) -> None:
    """Byte for byte."""
    for file in companions(source):
        shutil.copyfile(file, target / file.name)


def carry_modeling(target: Path) -> None:
    """Copy the code that loads the checkpoint with trust_remote_code, without this package."""
    for file in CARRIED:
        shutil.copyfile(file, target / file.name)


def code_modules(auto_map: Any) -> set[str]:
    return {str(name).partition(".")[0] for name in auto_map.values()} if isinstance(auto_map, dict) else set()


def check_code(folder: Path, auto_map: Any) -> None:
    """That the code of a checkpoint, and what its config names of it, is this package's own, byte for byte.

    Raises VerificationError: nothing else is run to prove what was written.
    """
    wanted, ours = {f"{module}.py" for module in code_modules(auto_map)}, {file.name: file for file in CARRIED}
    for name in sorted(wanted | {file.name for file in folder.glob("*.py")}):
        file, own = folder / name, ours.get(name)
        if own is None or not file.is_file() or file.read_bytes() != own.read_bytes():
            raise VerificationError(
                f"{file} is not the code that was carried into the checkpoint, so it is not run. "
                "Take it away, and write the checkpoint again with --resume."
            )


def write_index(target: Path, weight_map: Mapping[str, str], *, total_bytes: int, total_parameters: int) -> None:
    """Write the index of the safetensors files. weight_map: the file of each tensor."""
    metadata = {"total_size": total_bytes, "total_parameters": total_parameters}
    write_json(target / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def write_json(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def adapter_config(base: str, ranks: Mapping[str, int], modules: Iterable[str] = ()) -> dict[str, Any]:
    """Make the adapter_config.json of a PEFT LoRA.

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
    """Join parts of the adapter's tensors into its folder, nothing held in memory; return its weights' file."""
    (target / ADAPTER).mkdir(exist_ok=True)
    write_json(target / ADAPTER / "adapter_config.json", config)
    with atomic_write(target / ADAPTER_WEIGHTS) as unfinished:
        join(parts, unfinished)
        unfinished.chmod(new_file_mode())
    return target / ADAPTER_WEIGHTS


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
