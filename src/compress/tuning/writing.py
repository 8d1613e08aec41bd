"""The tuned folder: the compressed one, of which nothing but what was trained has other bytes.

A file in which nothing was trained is linked or copied; in the others the new numbers take the place of the old ones,
so that every file keeps its size and every other tensor its bytes.
"""

import shutil
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from compress.calibration.weights import ADAPTER_PREFIX
from compress.checkpoints.card import CARD
from compress.checkpoints.files import ADAPTER_WEIGHTS, adapter_config, write_json
from compress.checkpoints.metadata import METADATA, Metadata
from compress.checkpoints.push import own_files
from compress.checkpoints.quality import QUALITY
from compress.inspection.checkpoint import blueprint
from compress.io import write_tensors
from compress.models.loading import load_config
from compress.models.stored_loading import read_lora, stored_tensors
from compress.models.tensor_files import ADAPTER, INDEX
from compress.models.untrusted import read_json
from compress.tuning.trained import Settled

# Of the checkpoint as it was: its metadata and card are written anew, and what was measured is true no more.
LEFT_BEHIND = (METADATA, CARD, QUALITY)
STALE = {"lost", "relative_error"}  # measured of weights that are others now


@dataclass(frozen=True)
class Written:
    """
    parts: sha256 by file. adapter: of a new one its config, and what it adds.
    """

    parts: dict[str, str]
    adapter: dict[str, Any] | None = None
    parameters: int = 0
    bytes: int = 0


def write_tuned(source: Path, target: Path, metadata: Metadata, settled: Settled) -> Written:
    """Everything but compress.json and the card."""
    shutil.rmtree(target / ADAPTER, ignore_errors=True)  # of an attempt that rounding has made worse
    stored, changed = stored_tensors(source, read_lora(source)), defaultdict[Path, dict[str, Tensor]](dict)
    for name, tensor in settled.tensors.items():
        place = stored.tensors[str(stored.find(name))]
        changed[place.file.relative_to(source)][place.name] = tensor
    written = {str(file): put_tensors(source / file, target / file, new) for file, new in changed.items()}
    for name in own_files(source, metadata):
        if name in LEFT_BEHIND or name.endswith(".gguf") or name in written:
            continue
        # One file under two names where the disk allows it: files of weights are replaced, never changed.
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).unlink(missing_ok=True)
        if name.endswith(".safetensors"):
            with suppress(OSError):
                (target / name).hardlink_to(source / name)
                continue
        shutil.copyfile(source / name, target / name)
    parts = metadata.parts | written
    if not settled.adapter:
        return Written(parts)
    modules = [path for path, _ in blueprint(source, metadata).named_modules()]
    ranks = {name.removesuffix(".lora_A"): len(A) for name, A in settled.adapter.items() if name.endswith(".lora_A")}
    return add_adapter(target, parts, settled.adapter, adapter_config(metadata.name, ranks, modules))


def put_tensors(source: Path, target: Path, new: Mapping[str, Tensor]) -> str:
    """A copy of a safetensors file with other numbers in some of its tensors, in the dtypes that it has; its sha256.

    new: these, by the names that they have there.
    """
    tensors = load_file(source)
    for name, tensor in new.items():
        assert tensor.shape == tensors[name].shape
        tensors[name] = tensor.to("cpu", tensors[name].dtype).contiguous()
    target.parent.mkdir(exist_ok=True)
    return write_tensors(target, tensors).sha256


def add_adapter(target: Path, parts: dict[str, str], adapter: Mapping[str, Tensor], config: dict[str, Any]) -> Written:
    """A PEFT folder beside the checkpoint, in the dtype of its other floats; the index counts it in."""
    dtype = load_config(target).dtype or torch.float32
    tensors = {
        f"{ADAPTER_PREFIX}{name}.weight": tensor.to("cpu", dtype).contiguous() for name, tensor in adapter.items()
    }
    (target / ADAPTER).mkdir(exist_ok=True)
    write_json(target / ADAPTER / "adapter_config.json", config)
    written = write_tensors(target / ADAPTER_WEIGHTS, tensors)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    index = read_json(target / INDEX)
    index["metadata"]["total_parameters"] += numbers
    write_json(target / INDEX, index)
    size = sum(tensor.nbytes for tensor in tensors.values())
    return Written(parts | {ADAPTER_WEIGHTS: written.sha256}, config, numbers, size)


def tuned_metadata(compressed: Metadata, written: Written, tuning: Mapping[str, Any]) -> Metadata:
    """That of the tuned checkpoint: the compressed one's, without what is true no more, and the tuning."""
    size = compressed.size
    changes = {
        "name": f"{compressed.name}-tuned",
        "parts": written.parts,
        "size": {"parameters": size.parameters + written.parameters, "bytes": size.bytes + written.bytes},
        "export": "hf",
        "held_out_divergence": None,
        "points": [point.model_dump(mode="json", exclude_unset=True, exclude=STALE) for point in compressed.points],
        "linears": [each.model_dump(mode="json", exclude_unset=True, exclude=STALE) for each in compressed.linears],
        "tuning": {**tuning, "compressed_parts": compressed.parts},
    }
    adapter = {"adapter": written.adapter} if written.adapter else {}
    return Metadata.model_validate({**compressed.to_dict(), **changes, **adapter})
