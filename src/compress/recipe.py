"""A recipe: which stages, on which calibration text, from which seed. With the model it determines the output."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, field_validator, model_validator

from compress import stages
from compress.errors import UsageError, unknown_name
from compress.stages._stage import StageConfig

DTYPES = ("float16", "bfloat16", "float32", "float64")


class Calibration(BaseModel):
    """
    source: the name of a data set or a text file. samples: windows. seq_len: tokens a window.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: str
    samples: Annotated[int, Field(ge=1)] = 128
    seq_len: Annotated[int, Field(ge=2)] = 2048


class Recipe(BaseModel):
    """
    method: the name the result goes by. dtype: of the written weights, None for the input's own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    method: str
    stages: tuple[SerializeAsAny[StageConfig], ...]
    calibration: Calibration
    seed: Annotated[int, Field(ge=0)] = 42
    dtype: str | None = None

    @field_validator("stages", mode="before")
    @classmethod
    def _find_stages(cls, value: Any) -> Any:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ValueError("stages is a list")
        return tuple(entry if isinstance(entry, StageConfig) else parse_stage(entry) for entry in value)

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, value: str | None) -> str | None:
        if value is not None and value not in DTYPES:
            raise ValueError(unknown_name("dtype", value, DTYPES))
        return value

    @model_validator(mode="after")
    def _in_order(self) -> "Recipe":
        if not self.stages:
            raise ValueError("a recipe needs at least one stage")
        names = [stage.stage for stage in self.stages]
        for position, stage in enumerate(self.stages):
            for earlier in stage.after:
                if earlier not in names[:position]:
                    raise ValueError(f"{stage.stage} needs {earlier} before it; the order is {', '.join(names)}")
        return self


def parse_stage(entry: Any) -> StageConfig:
    name = entry.get("stage") if isinstance(entry, dict) else None
    if name not in stages.names():
        raise ValueError(unknown_name("stage", str(name), stages.names()))
    return stages.stage_class(name).model_validate(entry)


def parse_recipe(data: Any) -> Recipe:
    """A recipe from plain data. Raises UsageError with every fault, a line each."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            place = ".".join(str(step) for step in fault["loc"])
            faults.append(f"{place + ': ' if place else ''}{fault['msg'].removeprefix('Value error, ')}")
        raise UsageError("\n".join(faults)) from error


def read_recipe(file: Path) -> dict[str, Any]:
    """The plain data of a YAML recipe, to be completed by options and given to `parse_recipe`."""
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"The recipe {file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UsageError(f"The recipe {file} is no mapping. Start it with 'method:' and 'stages:'.")
    return data


def slicegpt(
    rule: dict[str, Any],
    *,
    signal: str = "stream",
    final_orientation: str = "pca",
    round_to: int = 8,
    slice_head: bool = False,
    measure_error: bool = False,
) -> list[dict[str, Any]]:
    """The stages of SliceGPT (arXiv 2401.15024). `rule` is how `slice` chooses widths, such as {"ratio": 0.25}."""
    return [
        {"stage": "fold_norms"},
        *([{"stage": "measure_error"}] if measure_error else []),
        {"stage": "rotate", "signal": signal, "final_orientation": final_orientation},
        {"stage": "slice", **rule, "round_to": round_to, "slice_head": slice_head},
    ]
