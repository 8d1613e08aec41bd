"""Which model a command takes that was not told, and in which dtype it computes."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def newest_output() -> Path | None:
    """The checkpoint last written under ./compressed."""
    found = [file.parent for file in Path("compressed").glob("*/compress.json")]
    outputs = [folder for folder in found if folder.suffix not in (".partial", ".replaced")]
    return max(outputs, key=lambda folder: (folder / "compress.json").stat().st_mtime) if outputs else None


def computing_dtype(asked: str | None, config: object, device: "torch.device") -> "torch.dtype":
    """What was asked for, or the model's own; on the CPU at least float32."""
    import torch

    if asked is not None:
        named: torch.dtype = getattr(torch, asked)
        return named
    own = getattr(config, "dtype", None) or torch.float32
    return torch.promote_types(own, torch.float32) if device.type == "cpu" else own
