"""compress.json, read back: what a checkpoint says of itself, trusted in nothing but its types."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress.errors import CheckpointError
from compress.models.json_text import parse_json
from compress.models.loading import check_format

FACTS = "compress.json"
LARGEST = 2**26  # bytes of a JSON file; a report on 10 000 linears takes a twentieth
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]


class Told(BaseModel):
    """Unknown keys are let be: a later version may say more."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class Amount(Told):
    parameters: Positive
    bytes: Positive


class Calibration(Told):
    source: str
    samples: Count
    seq_len: Count


class RecipeFacts(Told):
    method: str
    calibration: Calibration


class Point(Told):
    """A point of the stream. relative_error: of the stream's energy, the share that differs from the dense model's.

    spectrum: the mean share of the energy that a direction has, of equal stretches of directions; of a basis that all
    points share at the first one alone.
    """

    point: str
    width: Positive
    dense_width: Positive
    kept_energy: float | None = None
    relative_error: float | None = None
    spectrum: list[float] | None = None


class LinearFacts(Told):
    """linear: its path in the dense model. lost: the share of its outputs' energy that it does not give any more."""

    linear: str
    rank: Count | None = None
    adapter_rank: Count | None = None
    full_rank: Positive | None = None
    form: str | None = None
    bits: int | str | None = None
    pattern: str | None = None
    lost: float | None = None


class AdapterFacts(Told):
    model_config = ConfigDict(frozen=True, strict=True, extra="allow")
    r: Positive
    rank_pattern: dict[str, Positive] = {}


class AlternativeFacts(Told):
    name: str
    bits_per_weight: float
    bytes: Positive


class Origin(Told):
    """Of the input's own card: what a card of ours passes on."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: str | list[str] | None = None


class TunedOn(Told):
    source: str
    repository: str | None = None
    licence: str | None = None
    windows: Positive
    seq_len: Positive


class HeldOut(Told):
    """Cross-entropies of the next token in nats, before and after; of the dense model where it was asked."""

    before: float
    after: float
    dense: float | None = None


class Elsewhere(Told):
    """The same on another text. worse: by more than was to be borne."""

    source: str
    before: float
    after: float
    worse: bool


class TuningFacts(Told):
    """compressed_parts: the sha256 of the files before they were tuned."""

    command: str
    data: TunedOn
    trained: str
    distill: str
    teacher: str | None = None
    steps: Count
    best_step: Count
    learning_rate: float
    relative_rate: bool = False
    held_out: HeldOut
    unlike: Elsewhere | None = None
    compressed_parts: dict[str, str]


class Facts(Told):
    """format: see `compress.version`."""

    format: int
    name: str
    base_model: str
    command: str
    recipe: RecipeFacts
    architecture: Annotated[str, Field(pattern=r"\A\w{1,200}\z")]
    loads_without_our_code: bool
    versions: dict[str, str]
    fingerprints: dict[str, str]
    dense_size: Amount
    size: Amount
    adapter: AdapterFacts | None = None
    storage: Literal["packed", "compact"] | None = None
    quantized: bool = False
    unpacks_while_loading: bool = False
    not_for_vllm: str | None = None
    alternatives: list[AlternativeFacts] = []
    units: dict[str, Count | list[Count]] = {}
    held_out_divergence: float | None = None
    export: str = "hf"
    origin: Origin = Origin()
    tuning: TuningFacts | None = None
    points: list[Point]
    linears: list[LinearFacts] = []
    parts: dict[str, str]


def read_facts(folder: Path) -> Facts:
    """Raises CheckpointError with the first thing that is not as it is written."""
    found = read_json(folder / FACTS)
    number = found.get("format", 1)  # format 1 did not say it
    if isinstance(number, int):
        check_format(folder, number)
    try:
        return Facts.model_validate(found)
    except ValidationError as error:
        raise CheckpointError(f"{folder / FACTS} is damaged: {first_fault(error)}. Get it again.") from error


def first_fault(error: ValidationError) -> str:
    """Where it is, and what should be there."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where!r}: {first['msg'][:1].lower()}{first['msg'][1:]}"


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of a sensible size. Raises CheckpointError."""
    try:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing. Get it again.")
        if file.stat().st_size > LARGEST:
            raise CheckpointError(f"{file} is larger than any that is written ({LARGEST:,} bytes). Get it again.")
        found = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: it cannot be read as JSON. Get it again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} is damaged: it is no JSON object. Get it again.")
    return found
