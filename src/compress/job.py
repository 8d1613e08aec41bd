"""What is to be compressed, how, and to where."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from compress.checkpoints.output_folder import Output
from compress.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Job(Output):
    """
    command: how a user would ask for it again; it goes into the model card.
    export: `hf` for the checkpoint folder alone, `gguf` for a GGUF file in it as well.
    batch_size: windows at a time; None for about 8192 tokens.
    cache_memory: bytes of activations to hold in memory; None for half of what is free.
    max_memory: bytes that the run may hold at once, the process that reloads the result included; None for no limit.
    """

    recipe: Recipe
    command: str
    export: Literal["hf", "gguf"] = "hf"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int | None = None
    cache_memory: int | None = None
    max_memory: int | None = None
    data_dir: Path | None = None
