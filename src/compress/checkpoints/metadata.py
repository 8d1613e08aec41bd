"""compress.json: how a checkpoint came about and what is in it. Written and read by these classes alone.

What is read is trusted in nothing but its types. Keys that are not known are kept: a later version may say more.
"""

import hashlib
import platform
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress.calibration.weights import LazyWeights
from compress.checkpoints.files import write_json
from compress.errors import CheckpointError
from compress.models.loading import check_format
from compress.models.untrusted import read_json
from compress.version import __version__

METADATA = "compress.json"
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
R = TypeVar("R", bound="Record")


class Record(BaseModel):
    """An object of a JSON file."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False, extra="allow")

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_unset=True)


class ModelSize(Record):
    parameters: Positive
    bytes: Positive


class CalibrationMetadata(Record):
    source: str
    samples: Count
    seq_len: Count


class RecipeMetadata(Record):
    method: str
    calibration: CalibrationMetadata


class Point(Record):
    """A point of the stream.

    relative_error: of the stream's energy, the share that differs from the dense model's.
    spectrum: the mean share of the energy that a direction has, of equal stretches of directions; of a basis that all
        points share at the first one alone.
    """

    point: str
    width: Positive
    dense_width: Positive
    kept_energy: float | None = None
    relative_error: float | None = None
    spectrum: list[float] | None = None


class LinearMetadata(Record):
    """A compressed linear. linear: its path in the dense model. lost: the share of its outputs' energy that is lost."""

    linear: str
    rank: Count | None = None
    adapter_rank: Count | None = None
    full_rank: Positive | None = None
    form: str | None = None
    bits: int | str | None = None
    pattern: str | None = None
    lost: float | None = None


class AdapterMetadata(Record):
    """The adapter_config.json of the adapter beside the checkpoint."""

    r: Positive
    rank_pattern: dict[str, Positive] = {}


class Alternative(Record):
    """A way to store the same linears."""

    name: str
    bits_per_weight: float
    bytes: Positive


class Mixture(Record):
    """Matrices of a kind in a GGUF file: how many have which type, and their bytes."""

    part: str
    types: dict[str, Count]
    bytes: Count


class Origin(Record):
    """From the model card of the dense model: what the card of the compressed one repeats."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: str | list[str] | None = None


class TuningData(Record):
    source: str
    repository: str | None = None
    license: str | None = None
    fingerprint: str
    windows: Positive
    seq_len: Positive


class HeldOut(Record):
    """Cross-entropies of the next token in nats, before and after; of the dense model where it was asked."""

    windows: Positive
    before: float
    after: float
    dense: float | None = None


class OtherText(Record):
    """The same on a text that was not trained on. worse: by more than 5% of perplexity."""

    source: str
    windows: Positive
    before: float
    after: float
    worse: bool


class LoraMetadata(Record):
    rank: Positive
    alpha: Positive
    merged: bool


class TuningMetadata(Record):
    """What `compress finetune` did.

    losses: of every look the step, the loss in training since the last one (None at first) and on held-out windows.
    compressed_parts: the sha256 of the files before they were tuned.
    """

    command: str
    data: TuningData
    trained: str
    trained_parameters: Positive
    lora: LoraMetadata | None
    distill: str
    teacher: str | None
    learning_rate: float
    relative_rate: bool
    batch_size: Positive
    planned_steps: Count
    steps: Count
    best_step: Count
    losses: list[list[int | float | None]]
    held_out: HeldOut
    other_text: OtherText | None
    compressed_parts: dict[str, str]


class Metadata(Record):
    """compress.json.

    format: see `compress.version`. parts: the sha256 of the files of weights. trials: what a search has tried.
    dropped: the blocks of the dense model that are left out, counted from 0.
    tables: embeddings and head where they are packed.
    """

    format: int
    name: str
    base_model: str
    command: str
    recipe: RecipeMetadata
    stages: list[dict[str, Any]] = []
    trials: list[dict[str, Any]] = []
    dropped: list[int] = []
    architecture: Annotated[str, Field(pattern=r"\A\w{1,200}\z")]
    loads_without_our_code: bool
    versions: dict[str, str]
    fingerprints: dict[str, str]
    device: str = "cpu"
    batch_size: int | None = None
    itemsize: Positive = 4
    dense_size: ModelSize
    size: ModelSize
    adapter: AdapterMetadata | None = None
    form: Literal["packed", "compact", "gguf"] | None = None
    quantized: bool = False
    unpacks_while_loading: bool = False
    not_for_vllm: str | None = None
    alternatives: list[Alternative] = []
    mixture: list[Mixture] = []
    units: dict[str, Count | list[Count]] = {}
    held_out_divergence: float | None = None
    export: str = "hf"
    origin: Origin = Origin()
    tuning: TuningMetadata | None = None
    points: list[Point]
    groups: list[dict[str, Any]] = []
    linears: list[LinearMetadata] = []
    tables: list[LinearMetadata] = []
    parts: dict[str, str]

    def write(self, folder: Path) -> None:
        write_json(folder / METADATA, self.to_dict())


def read_metadata(folder: Path) -> Metadata:
    """Raises CheckpointError with the first thing that is not as it is written."""
    found = read_json(folder / METADATA)
    number = found.get("format", 1)  # format 1 did not say it
    if isinstance(number, int):
        check_format(folder, number)
    return validated(Metadata, found, folder / METADATA, "Get it again.")


def validated(kind: type[R], found: dict[str, Any], file: Path, remedy: str) -> R:
    """Raises CheckpointError that says where the first problem is, and what should be there."""
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where, what = ".".join(map(str, first["loc"])), f"{first['msg'][:1].lower()}{first['msg'][1:]}"
        raise CheckpointError(f"{file} is damaged: {where!r}: {what}. {remedy}") from error


def versions() -> dict[str, str]:
    return {
        "compress": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def input_fingerprint(folder: Path, weights: LazyWeights) -> str:
    """The sha256 of config.json, the names, shapes and types of all tensors, and a row from the middle of each."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for name, sample in weights.samples():
        tensor = weights.stored.tensors[name]
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(sample)
    return digest.hexdigest()
