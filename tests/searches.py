"""Searches of the types of a tiny Llama's matrices, as `compress auto` and what is below it are asked for them."""

from pathlib import Path
from typing import Any

from compress import presets
from compress.models.hub import find_model
from compress.planning.prepare import Job, Prepared, prepare
from compress.recipe import parse_recipe


def auto(home: Path, *options: object, model: str = "llama") -> list[object]:
    text = ["--calib", home / "text.txt", "--samples", 8, "--seq-len", 32]
    return ["auto", "--model", home / model, *text, "--trials", 3, *options]


def prepared_for(home: Path, engine: str, size: int, out: Path, *, model: str = "llama") -> Prepared:
    data: dict[str, Any] = presets.load("auto" if engine == "llama.cpp" else "auto-packed")
    data |= {"calibration": {"source": str(home / "text.txt"), "samples": 8, "seq_len": 32}}
    data |= {"budget": {"target_size": size}}
    if engine != "llama.cpp":
        data["stages"][-1]["quantize"]["engine"] = engine
    return prepare(Job(model=find_model(str(home / model)), recipe=parse_recipe(data), out=out, command=""))
