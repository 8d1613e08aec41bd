"""The tuned folder: the compressed one, of which nothing but what was trained has other bytes.

A file in which nothing was trained is linked or copied; in the others the new numbers take the place of the old ones,
byte for byte where these were, so that every file keeps its size and every other tensor its bytes.
"""

import json
import shutil
import struct
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.calibration.weights import ADAPTER_PREFIX
from compress.checkpoints.card import CARD
from compress.checkpoints.files import ADAPTER_WEIGHTS, adapter_config, adapter_file, write_adapter, write_json
from compress.checkpoints.metadata import METADATA, Metadata, Record
from compress.checkpoints.push import own_files
from compress.checkpoints.quality import QUALITY
from compress.inspection.blueprint import blueprint
from compress.io import atomic_write, new_file_mode, sha256, write_tensors
from compress.models.loading import load_config
from compress.models.stored_loading import read_lora, stored_tensors
from compress.models.tensor_files import ADAPTER, INDEX
from compress.models.untrusted import read_json
from compress.tuning.trained import Settled

# Of the checkpoint as it was: its metadata and card are written anew, and what was measured is true no more.
LEFT_BEHIND = (METADATA, CARD, QUALITY)
STALE = ("lost", "relative_error")  # measured of weights that are others now


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
    parts = metadata.parts | write_weights(source, target, settled.tensors)
    for file in own_files(source, metadata):
        if file in LEFT_BEHIND or file.endswith(".gguf") or parts.get(file) != metadata.parts.get(file):
            continue
        (target / file).parent.mkdir(exist_ok=True)
        link_or_copy(source / file, target / file)
    if not settled.adapter:
        return Written(parts)
    modules = [path for path, _ in blueprint(source, metadata).named_modules()]
    config = adapter_config(metadata.name, ranks_of(settled.adapter), modules)
    return add_adapter(target, parts, settled.adapter, config)


def write_weights(source: Path, target: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The files of weights in which tensors are others now, each read when its turn comes; their sha256."""
    stored = stored_tensors(source, read_lora(source))
    places: dict[Path, dict[str, str]] = defaultdict(dict)
    for name in tensors:
        place = stored.tensors[str(stored.find(name))]
        places[place.file.relative_to(source)][place.name] = name
    for file, names in places.items():
        (target / file).parent.mkdir(exist_ok=True)
        put_tensors(source / file, target / file, names, tensors)
    return {str(file): sha256(target / file) for file in places}


def put_tensors(source: Path, target: Path, names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """A copy of a safetensors file with other numbers in some of its tensors, in the dtypes that it has.

    names: of those by the names that they have there.
    """
    with atomic_write(target) as unfinished:
        shutil.copyfile(source, unfinished)
        with unfinished.open("r+b") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
            for inside, name in names.items():
                entry, tensor = header[inside], tensors[name]
                start, stop = entry["data_offsets"]
                data = raw(tensor, DTYPES.get(entry["dtype"], tensor.dtype))
                assert list(tensor.shape) == entry["shape"]
                assert len(data) == stop - start
                file.seek(8 + length + start)
                file.write(data)
        unfinished.chmod(new_file_mode())


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}


def raw(tensor: Tensor, dtype: torch.dtype) -> bytes:
    data: bytes = tensor.detach().cpu().to(dtype).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return data


def link_or_copy(source: Path, target: Path) -> None:
    """One file under two names where the disk allows it: files of weights are replaced, never changed."""
    target.unlink(missing_ok=True)
    if source.suffix == ".safetensors":
        try:
            target.hardlink_to(source)
        except OSError:
            pass
        else:
            return
    shutil.copyfile(source, target)


def ranks_of(adapter: Mapping[str, Tensor]) -> dict[str, int]:
    """By the linear's path."""
    return {name.removesuffix(".lora_A"): len(A) for name, A in adapter.items() if name.endswith(".lora_A")}


def add_adapter(target: Path, parts: dict[str, str], adapter: Mapping[str, Tensor], config: dict[str, Any]) -> Written:
    """A PEFT folder beside the checkpoint, in the dtype of its other floats; the index counts it in."""
    dtype = load_config(target).dtype or torch.float32
    tensors = {
        f"{ADAPTER_PREFIX}{name}.weight": tensor.to("cpu", dtype).contiguous() for name, tensor in adapter.items()
    }
    passing = target / adapter_file(0)
    write_tensors(passing, tensors)
    written = write_adapter(target, [passing], config)
    passing.unlink()
    numbers = sum(tensor.numel() for tensor in tensors.values())
    index = read_json(target / INDEX)
    index["metadata"]["total_parameters"] += numbers
    write_json(target / INDEX, index)
    size = sum(tensor.nbytes for tensor in tensors.values())
    return Written(parts | {ADAPTER_WEIGHTS: sha256(written)}, config, numbers, size)


def tuned_metadata(compressed: Metadata, written: Written, tuning: Mapping[str, Any]) -> Metadata:
    """That of the tuned checkpoint: the compressed one's, without what is true no more, and the tuning."""
    size = compressed.size
    changes = {
        "name": f"{compressed.name}-tuned",
        "parts": written.parts,
        "size": {"parameters": size.parameters + written.parameters, "bytes": size.bytes + written.bytes},
        "export": "hf",
        "held_out_divergence": None,
        "points": [without_stale(point) for point in compressed.points],
        "linears": [without_stale(linear) for linear in compressed.linears],
        "tuning": {**tuning, "compressed_parts": compressed.parts},
    }
    adapter = {"adapter": written.adapter} if written.adapter else {}
    return Metadata.model_validate({**compressed.to_dict(), **changes, **adapter})


def without_stale(report: Record) -> dict[str, Any]:
    return {key: value for key, value in report.to_dict().items() if key not in STALE}
