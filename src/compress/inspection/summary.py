"""A checkpoint looked at: verified against what it says of itself, its blocks and linears summed up from the files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from compress.checkpoints.files import ADAPTER_WEIGHTS
from compress.checkpoints.integrity import check_integrity, check_mapped
from compress.checkpoints.metadata import METADATA, Metadata, Point, read_metadata
from compress.checkpoints.quality import Quality, read_quality
from compress.checkpoints.run_folder import check_folder
from compress.errors import UsageError
from compress.inspection.blueprint import blueprint, check_against, named
from compress.inspection.linears import StoredLinear, Zeros, block_of, foreign_linears, linears_of, zeros_of
from compress.models.stored_loading import read_lora
from compress.models.tensor_files import INDEX, StoredTensor, checkpoint_files, read_header
from compress.models.untrusted import read_json
from compress.progress import Progress, Steps

ENDS = ("lm_head.", "embed_out.", ".norm.", "final_layer_norm.", "final_layernorm.", "ln_f.")


@dataclass(frozen=True)
class Inspection:
    """
    metadata: what it says of itself; None for a checkpoint that is not ours. config: config.json.
    tensors: of the model and of its adapter. zeros: by the linear's path; empty where none were counted.
    verified: whether the weights were compared with their checksums.
    """

    folder: Path
    metadata: Metadata | None
    config: Mapping[str, Any]
    tensors: Sequence[StoredTensor]
    linears: Sequence[StoredLinear]
    zeros: Mapping[str, Zeros | None]
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
    def bits_per_weight(self) -> float | None:
        """Of the linears in the blocks."""
        return bits_per_weight([linear for linear in self.linears if linear.block is not None])


def inspect(folder: Path, *, fast: bool, progress: Progress) -> Inspection:
    """
    fast: reads headers alone, verifies no checksums and counts no zeros.

    Raises UsageError for a folder that is no finished checkpoint, CheckpointError for a damaged one.
    """
    check_folder(folder)
    metadata = read_metadata(folder) if (folder / METADATA).exists() else None
    if metadata is not None and metadata.storage == "gguf":
        raise UsageError(f"{folder} is one GGUF file, not a checkpoint of safetensors. gguf-dump shows its tensors.")
    if metadata is None:
        tensors, linears = read_foreign(folder)
    else:
        check_integrity(folder, metadata, checksums=not fast, progress=progress)
        tensors, linears = read_ours(folder, metadata)
    counted = [] if fast else linears
    zeros, steps = {}, Steps(progress, "counting zeros", len(counted))
    for linear in counted:
        steps.next(linear.path)
        zeros[linear.path] = zeros_of(linear)
    steps.end()
    return Inspection(
        folder=folder,
        metadata=metadata,
        config=read_json(folder / "config.json"),
        tensors=tensors,
        linears=linears,
        zeros=zeros,
        quality=read_quality(folder),
        verified=metadata is not None and not fast,
    )


def read_ours(folder: Path, metadata: Metadata) -> tuple[list[StoredTensor], list[StoredLinear]]:
    files = [folder / name for name in metadata.parts if name != ADAPTER_WEIGHTS]
    files += [folder / ADAPTER_WEIGHTS] if metadata.adapter else []
    found = [tensor for file in files for tensor in read_header(file)]
    model = blueprint(folder, metadata)
    tensors = named(found, read_lora(folder) if metadata.adapter else None)
    check_against(model, tensors, metadata)
    return found, linears_of(model, tensors, metadata.linears)


def read_foreign(folder: Path) -> tuple[list[StoredTensor], list[StoredLinear]]:
    read_json(folder / "config.json")
    if (folder / INDEX).is_file():
        read_json(folder / INDEX)
    found = [tensor for file in checkpoint_files(folder) for tensor in read_header(file)]
    if (folder / INDEX).is_file():
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
    return "head" if any(end in tensor.name for end in ENDS) else "embeddings"


def block(seen: Inspection, place: int | str, tensors: Sequence[StoredTensor]) -> dict[str, Any]:
    """A block, or what comes before the first or after the last of them.

    widths: of the stream behind the embeddings or behind each branch. error: relative, of the stream behind the block.
    lost: of the linears' outputs, the share of their energy that is gone, the mean over those that were changed.
    """
    linears = [linear for linear in seen.linears if linear.block == place]
    points = [point for point in seen.points if point_place(point) == place]
    errors = [point.relative_error for point in points if point.relative_error is not None]
    zeros = [found for linear in linears if (found := seen.zeros.get(linear.path)) is not None]
    lost = [each.metadata.lost for each in linears if each.metadata and each.metadata.lost is not None]
    return {
        "name": f"block {place}" if isinstance(place, int) else place,
        "widths": [point.width for point in points],
        "units": units_of(seen, place) if isinstance(place, int) else {},
        "ranks": [linear.rank for linear in linears if linear.rank],
        "bits": sorted({linear.bits for linear in linears}),
        "bits_per_weight": bits_per_weight(linears),
        "zeros": sum(each.count for each in zeros) / sum(each.total for each in zeros) if zeros else None,
        "patterns": sorted({each.pattern if each.kept else f"{each.pattern} broken" for each in zeros if each.pattern}),
        "error": errors[-1] if errors else None,
        "lost": fmean(lost) if lost else None,
        "parameters": parameters_of(seen, linears, tensors),
        "bytes": sum(tensor.bytes for tensor in tensors),
    }


def units_of(seen: Inspection, place: int) -> dict[str, int]:
    """How many units of each kind a block has."""
    counts = seen.metadata.units if seen.metadata else {}
    known = {kind: n for kind, n in counts.items() if isinstance(n, int) or place < len(n)}
    return {kind: n if isinstance(n, int) else n[place] for kind, n in known.items()}


def point_place(point: Point) -> int | str:
    kind, _, rest = point.point.partition(" ")
    number = rest.partition(" ")[0]
    return int(number) if kind == "block" and number.isdecimal() else point.point


def parameters_of(seen: Inspection, linears: Sequence[StoredLinear], tensors: Sequence[StoredTensor]) -> int | None:
    """Of the linears as they count themselves, and of what else there is."""
    if seen.parameters is None:
        return None
    of_linears = {(tensor.file, tensor.name) for linear in linears for tensor in linear.tensors.values()}
    rest = sum(tensor.numbers for tensor in tensors if (tensor.file, tensor.name) not in of_linears)
    return sum(linear.parameters for linear in linears) + rest


def bits_per_weight(linears: Sequence[StoredLinear]) -> float | None:
    weights = sum(linear.m * linear.n for linear in linears)
    return sum(linear.bits_per_weight * linear.m * linear.n for linear in linears) / weights if weights else None


# As plain data, for machines.


def as_data(seen: Inspection) -> dict[str, Any]:
    metadata = seen.metadata
    return {
        "folder": str(seen.folder),
        "made_by_compress": metadata is not None,
        "verified": seen.verified,
        "architecture": architecture(seen),
        "quantized_by": seen.quantized_by,
        "parameters": seen.parameters,
        "bytes": seen.bytes,
        "bits_per_weight": seen.bits_per_weight,
        "dtypes": dtypes(seen),
        **({} if metadata is None else origin(metadata)),
        "quality": None if seen.quality is None else seen.quality.model_dump(),
        "blocks": blocks(seen),
        "linears": [linear_data(linear, seen) for linear in seen.linears],
    }


def architecture(seen: Inspection) -> str:
    found = seen.config.get("architectures")
    return str(found[0] if isinstance(found, list) and found else seen.config.get("model_type", "unknown"))


def origin(metadata: Metadata) -> dict[str, Any]:
    said = {"base_model", "command", "loads_without_our_code", "storage", "not_for_vllm", "held_out_divergence"}
    said |= {"tuning", "dense_size", "versions", "points", "alternatives"}
    return {"method": metadata.recipe.method, **metadata.model_dump(include=said)}


def dtypes(seen: Inspection) -> dict[str, dict[str, int]]:
    """By the type of number: how many tensors have it, and their bytes."""
    found: dict[str, dict[str, int]] = {}
    for tensor in seen.tensors:
        entry = found.setdefault(tensor.dtype, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.bytes
    return found


def linear_data(linear: StoredLinear, seen: Inspection) -> dict[str, Any]:
    zeros = seen.zeros.get(linear.path)
    return {
        "linear": linear.path,
        "outputs": linear.m,
        "inputs": linear.n,
        "form": linear.form.kind,
        "rank": linear.rank,
        "bits": linear.bits,
        "bits_per_weight": linear.bits_per_weight,
        "zeros": None if zeros is None else zeros.share,
        "pattern": None if zeros is None else zeros.pattern,
        "pattern_kept": None if zeros is None or zeros.pattern is None else zeros.kept,
        "lost": linear.metadata.lost if linear.metadata else None,
        "parameters": linear.parameters,
        "bytes": linear.bytes,
    }
