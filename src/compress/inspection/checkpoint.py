"""A checkpoint looked at: verified against what it says of itself, its blocks and linears summed up from the files."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel

from compress.checkpoints.files import ADAPTER_WEIGHTS
from compress.checkpoints.integrity import check_integrity, check_mapped
from compress.checkpoints.metadata import METADATA, LinearMetadata, Metadata, Point, read_metadata
from compress.checkpoints.quality import Quality, read_quality
from compress.checkpoints.run_folder import check_folder
from compress.errors import CheckpointError
from compress.inspection.linears import (
    StoredLinear,
    bits_per_weight,
    block_of,
    foreign_linears,
    linears_of,
    zeros_of,
)
from compress.models.gguf_header import read_header as read_gguf_header
from compress.models.gguf_weights import check_extra
from compress.models.loading import empty_model, load_config
from compress.models.storage import num_parameters
from compress.models.stored_loading import put_linears, put_tables, read_lora, read_schemes, stored_tensors
from compress.models.tensor_files import INDEX, StoredTensor, checkpoint_files, own_name, read_header
from compress.models.untrusted import read_json, reading
from compress.own_model.modeling_compress import AdaptedLinear, unfuse_experts
from compress.progress import Progress, Steps

HEAD = ("lm_head.", "embed_out.", ".norm.", "final_layer_norm.", "final_layernorm.", "ln_f.", "output")
# Columns that are called otherwise than in the JSON, and how their numbers are shown.
HEADINGS = {
    **{"name": "", "linear": "", "widths": "width", "kv_groups": "KV", "ranks": "rank", "patterns": "pattern"},
    **{"bits_per_weight": "bits a weight", "error": "stream error"},
}
FORMATS = {"bits_per_weight": ".2f", "zeros": ".1%", "error": ".2%", "lost": ".2%"}


@dataclass(frozen=True)
class BlockTensor(StoredTensor):
    """Of a GGUF file. bits: of a number, its block's scales included."""

    bits: float

    @property
    def bytes(self) -> int:
        return int(self.numbers * self.bits) // 8


@dataclass(frozen=True)
class Inspection:
    """What is in a checkpoint's files.

    metadata: what it says of itself; None for a checkpoint that is not ours. config: config.json.
    tensors: of the model and of its adapter, or of a GGUF file, which has no linears here.
    verified: whether the weights were compared with their checksums.
    """

    folder: Path
    metadata: Metadata | None
    config: Mapping[str, Any]
    tensors: Sequence[StoredTensor]
    linears: Sequence[StoredLinear]
    quality: Quality | None
    verified: bool

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def parameters(self) -> int | None:
        """None where weights are packed in a way that is not read here."""
        if self.metadata is not None:
            return self.metadata.size.parameters
        return None if self.quantized_by else sum(tensor.numbers for tensor in self.tensors)

    @property
    def points(self) -> list[Point]:
        return [] if self.metadata is None else self.metadata.points

    @property
    def quantized_by(self) -> str | None:
        found = self.config.get("quantization_config")
        return str(found.get("quant_method", "unnamed")) if isinstance(found, dict) else None

    @property
    def is_gguf(self) -> bool:
        return self.metadata is not None and self.metadata.form == "gguf"

    @property
    def bits_per_weight(self) -> float | None:
        """Of the linears in the blocks."""
        if self.is_gguf:
            return bits_of_matrices(tensor for tensor in self.tensors if block_of(tensor.name) is not None)
        return bits_per_weight(linear for linear in self.linears if linear.block is not None)

    @property
    def reports(self) -> list[LinearMetadata]:
        """What the run has said of the linears."""
        if self.is_gguf and self.metadata is not None:
            return self.metadata.linears
        return [linear.metadata for linear in self.linears if linear.metadata is not None]


def inspect(folder: Path, *, fast: bool, progress: Progress) -> Inspection:
    """Read what is in a checkpoint.

    fast: reads headers alone, verifies no checksums and counts no zeros.

    Raises UsageError for a folder that is no finished checkpoint, CheckpointError for a damaged one.
    """
    check_folder(folder)
    metadata = read_metadata(folder) if (folder / METADATA).exists() else None
    if metadata is None:
        tensors, linears = read_foreign(folder)
    else:
        check_integrity(folder, metadata, checksums=not fast, progress=progress)
        is_gguf = metadata.form == "gguf"
        tensors, linears = (read_gguf(folder, metadata), []) if is_gguf else read_ours(folder, metadata)
    if not fast:
        steps = Steps(progress, "counting zeros", len(linears))
        for place, linear in enumerate(linears):
            steps.next(linear.path)
            linears[place] = replace(linear, zeros=zeros_of(linear))
        steps.end()
    if metadata is not None and metadata.form == "gguf":
        config: Mapping[str, Any] = {"architectures": [metadata.architecture]}
    else:
        config = read_json(folder / "config.json")
    verified = metadata is not None and not fast
    return Inspection(folder, metadata, config, tensors, linears, read_quality(folder), verified)


def read_ours(folder: Path, metadata: Metadata) -> tuple[list[StoredTensor], list[StoredLinear]]:
    """Raises CheckpointError where the files do not hold the tensors of the model of config.json, and no others."""
    files = [folder / name for name in metadata.parts if name != ADAPTER_WEIGHTS]
    files += [folder / ADAPTER_WEIGHTS] if metadata.adapter else []
    found = [tensor for file in files for tensor in read_header(file)]
    lora = read_lora(folder) if metadata.adapter else None
    inside = {} if lora is None else {stored: name for name, stored in lora.names.items()}
    tensors = {own_name(inside.get(tensor.name, tensor.name)): tensor for tensor in found}
    model = blueprint(folder, metadata)
    check_against(model, tensors, metadata)
    return found, linears_of(model, tensors, metadata.linears)


def read_gguf(folder: Path, metadata: Metadata) -> list[StoredTensor]:
    check_extra("Reading")
    headers = [read_gguf_header(folder / name) for name in metadata.parts]
    return [
        BlockTensor(header.file, each.name, each.kind, each.shape, 8 * each.row_bytes / each.shape[-1])
        for header in headers
        for each in header.tensors.values()
    ]


def blueprint(folder: Path, metadata: Metadata) -> PreTrainedModel:
    """The model of config.json on the meta device, its linears as they are stored. Raises CheckpointError for none."""
    parts = [name for name in metadata.parts if "/" not in name]
    with reading(f"The config.json of {folder} makes no model", "Get it again."):
        config = load_config(folder)
        num_blocks = config.get_text_config().num_hidden_layers
        # Before it is built: a count out of thin air would take forever. The embeddings and the head are parts, too.
        if num_blocks != len(parts) - 2:
            raise CheckpointError(f"config.json of {folder} says {num_blocks} blocks, {METADATA} {len(parts) - 2}.")
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # no library is to act on it
        model = unfuse_experts(empty_model(config))
        model.tie_weights()
        schemes, stored = read_schemes(folder), stored_tensors(folder, read_lora(folder))
        put_tables(model, schemes, stored, torch.float32)
        put_linears(model, schemes, stored, torch.float32)
        return model


def check_against(model: PreTrainedModel, tensors: dict[str, StoredTensor], metadata: Metadata) -> None:
    """That the files hold the model's tensors in its shapes, and no others. Raises CheckpointError."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys)
    missing = sorted(expected.keys() - tensors.keys() - tied)
    if missing:
        raise CheckpointError(f"config.json describes a model with {missing[0]!r}, which is in no file. Get it again.")
    unknown = sorted(tensors.keys() - expected.keys())
    if unknown:
        raise CheckpointError(f"The tensor {unknown[0]!r} has no place in the model of config.json. Get it again.")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name]:
            raise CheckpointError(
                f"The tensor {name!r} has the shape {list(tensor.shape)}, config.json says {list(expected[name])}. "
                "Get it again."
            )
    counted = num_parameters(model)
    if counted != metadata.size.parameters:
        raise CheckpointError(
            f"{METADATA} says {metadata.size.parameters:,} parameters, the files hold {counted:,}. Get it again."
        )


def read_foreign(folder: Path) -> tuple[list[StoredTensor], list[StoredLinear]]:
    has_index = (folder / INDEX).is_file()
    for name in ("config.json", INDEX) if has_index else ("config.json",):
        read_json(folder / name)
    found = [tensor for file in checkpoint_files(folder) for tensor in read_header(file)]
    if has_index:
        check_mapped(folder, found)
    return found, foreign_linears({tensor.name: tensor for tensor in found})


def blocks(seen: Inspection) -> list[dict[str, Any]]:
    """The embeddings, each block, and what follows the last one."""
    places: dict[int | str, list[StoredTensor]] = {}
    for tensor in seen.tensors:
        places.setdefault(place_of(tensor), []).append(tensor)
    numbers = sorted(place for place in places if isinstance(place, int))
    order: list[int | str] = ["embeddings", *numbers, "head"]
    return [block(seen, place, places[place]) for place in order if place in places]


def place_of(tensor: StoredTensor) -> int | str:
    number = block_of(tensor.name)
    if number is not None:
        return number
    return "head" if any(end in tensor.name for end in HEAD) else "embeddings"


def place_of_linear(linear: StoredLinear) -> int | str | None:
    """The block that it is in; of embeddings and head in few bits, which of these it is."""
    if linear.block is not None or not isinstance(linear.module, AdaptedLinear):
        return linear.block
    return place_of(next(iter(linear.tensors.values())))


def block(seen: Inspection, place: int | str, tensors: Sequence[StoredTensor]) -> dict[str, Any]:
    """A block, or what comes before the first or after the last of them.

    widths: of the stream after the embeddings or after each branch. error: relative, of the stream after the block.
    lost: of the linears' outputs, the share of their energy that is gone, the mean over those that were changed.
    """
    linears = [linear for linear in seen.linears if place_of_linear(linear) == place]
    points = [point for point in seen.points if point_place(point) == place]
    errors = [point.relative_error for point in points if point.relative_error is not None]
    zeros = [linear.zeros for linear in linears if linear.zeros is not None]
    lost = [each.lost for each in seen.reports if block_of(each.linear) == place and each.lost is not None]
    # The linears count themselves; besides them there are other tensors.
    of_linears = {(tensor.file, tensor.name) for linear in linears for tensor in linear.tensors.values()}
    rest = sum(tensor.numbers for tensor in tensors if (tensor.file, tensor.name) not in of_linears)
    parameters = sum(num_parameters(linear.module) for linear in linears) + rest
    units = dict[str, int]()  # of each kind, how many the block has
    for kind, n in seen.metadata.units.items() if seen.metadata else ():
        if isinstance(place, int) and (isinstance(n, int) or place < len(n)):
            units[kind] = n if isinstance(n, int) else n[place]
    return {
        "name": f"block {place}" if isinstance(place, int) else place,
        "widths": [point.width for point in points],
        "units": units,
        "ranks": [linear.rank for linear in linears if linear.rank],
        "bits": sorted({linear.bits for linear in linears}),
        "bits_per_weight": bits_of_matrices(tensors) if seen.is_gguf else bits_per_weight(linears),
        "zeros": sum(each.count for each in zeros) / sum(each.total for each in zeros) if zeros else None,
        "patterns": sorted({each.pattern if each.kept else f"{each.pattern} broken" for each in zeros if each.pattern}),
        "error": errors[-1] if errors else None,
        "lost": fmean(lost) if lost else None,
        "parameters": None if seen.parameters is None else parameters,
        "bytes": sum(tensor.bytes for tensor in tensors),
    }


def bits_of_matrices(tensors: Iterable[StoredTensor]) -> float | None:
    found = [tensor for tensor in tensors if len(tensor.shape) == 2]
    numbers = sum(tensor.numbers for tensor in found)
    return 8 * sum(tensor.bytes for tensor in found) / numbers if numbers else None


def point_place(point: Point) -> int | str:
    kind, _, rest = point.point.partition(" ")
    number = rest.partition(" ")[0]
    return int(number) if kind == "block" and number.isdecimal() else point.point


# As plain data, for machines.


def as_data(seen: Inspection) -> dict[str, Any]:
    metadata, classes = seen.metadata, seen.config.get("architectures")
    said = {"base_model", "command", "loads_without_our_code", "form", "not_for_vllm", "held_out_divergence"}
    said |= {"tuning", "dense_size", "versions", "points", "alternatives"}
    dtypes: dict[str, dict[str, int]] = {}
    for tensor in seen.tensors:
        entry = dtypes.setdefault(tensor.dtype, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.bytes
    return {
        "folder": str(seen.folder),
        "made_by_compress": metadata is not None,
        "verified": seen.verified,
        "architecture": str(
            classes[0] if isinstance(classes, list) and classes else seen.config.get("model_type", "unknown")
        ),
        "quantized_by": seen.quantized_by,
        "parameters": seen.parameters,
        "bytes": seen.bytes,
        "bits_per_weight": seen.bits_per_weight,
        "dtypes": dtypes,
        **({} if metadata is None else {"method": metadata.recipe.method, **metadata.model_dump(include=said)}),
        "quality": None if seen.quality is None else seen.quality.model_dump(),
        "blocks": blocks(seen),
        "linears": [linear.to_dict() for linear in seen.linears],
    }


def cells(entry: Mapping[str, Any], of_bytes: Callable[[int], str]) -> dict[str, str | None]:
    """A row of a table from a block's or a linear's entry in the plain data. of_bytes: how bytes are shown."""
    found: dict[str, Any] = {}
    for name, value in entry.items():
        found |= value if name == "units" else {name: value}
    if found.get("pattern") and not found.pop("pattern_kept"):
        found["pattern"] += " broken"
    found.pop("pattern_kept", None)
    return {HEADINGS.get(name, name): cell(name, value, of_bytes) for name, value in found.items()}


def cell(name: str, value: Any, of_bytes: Callable[[int], str]) -> str | None:
    if isinstance(value, list):
        distinct = list(dict.fromkeys(value))
        is_range = len(distinct) > 2 and not isinstance(value[0], str)
        return f"{min(value):,} to {max(value):,}" if is_range else ", ".join(map(str, distinct))
    if value is None or isinstance(value, str):
        return value
    return of_bytes(value) if name == "bytes" else format(value, FORMATS.get(name, ","))
