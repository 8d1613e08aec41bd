"""A recipe: which stages, on which calibration text, from which seed. With the model it determines the output."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import isclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, field_validator, model_validator

from compress import stages
from compress.calibration.depth import Depth
from compress.errors import UsageError, unknown_name
from compress.numerics import DTYPES
from compress.stages._stage import StageConfig

LEAST_TRIAL = 8  # windows


class Calibration(BaseModel):
    """
    source: the name of a data set or a text file. samples: windows. seq_len: tokens a window.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    source: str
    samples: Annotated[int, Field(ge=1)] = 128
    seq_len: Annotated[int, Field(ge=2)] = 2048


class Budget(BaseModel):
    """What the result may come to, a promise. Widths that the stages leave open are chosen under it.

    keep_params: a share of the dense model's parameters, a tied head counted once.
    target_size: bytes of the safetensors files on disk, or of the GGUF file.
    trial_samples: windows of each trial of a way to spend it, a quarter of them held out. Default: a quarter of all.
    trials, trial_seconds: how many sets of types of a GGUF file are tried, and how long at most.
    allocation: `uniform`, as many neurons in every block, or `free`: as many in all, where the loss feels them most.
        The result then has no stock shape.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    keep_params: Annotated[float, Field(gt=0, lt=1)] | None = None
    target_size: Annotated[int, Field(ge=1)] | None = None
    trial_samples: Annotated[int, Field(ge=8)] | None = None
    trials: Annotated[int, Field(ge=0)] = 20
    trial_seconds: Annotated[float, Field(gt=0)] | None = None
    allocation: Literal["uniform", "free"] = "uniform"

    @model_validator(mode="after")
    def _one_limit(self) -> "Budget":
        if (self.keep_params is None) == (self.target_size is None):
            raise ValueError("a budget is keep_params or target_size, one of the two")
        return self


class Recipe(BaseModel):
    """
    method: the name the result goes by. budget: what decides the widths that stages leave open.
    dtype: of the written weights, None for the input's own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    method: str
    stages: tuple[SerializeAsAny[StageConfig], ...]
    budget: Budget | None = None
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
        self._check_order()
        opened = [stage.stage for stage in self.stages if stage.opens]
        if opened and self.budget is None:
            raise ValueError(f"{opened[0]} is not told how much to keep; give it a ratio, or the recipe a budget")
        if self.budget is not None and not opened:
            raise ValueError("the recipe has a budget, but every stage says how much it keeps; leave one open")
        self._check_opens()
        self._check_inputs()
        free = self.budget is not None and self.budget.allocation == "free"
        if free and "neurons" not in [stage.opens for stage in self.stages]:
            raise ValueError(
                "allocation free lets the budget decide the neurons of each block; "
                "leave out prune_units' ratio (--mlp-ratio)"
            )
        if self.held_out_windows >= self.calibration.samples:
            raise ValueError("a stage holds calibration windows out of its fit; it needs 2 samples at least")
        return self

    def _check_opens(self) -> None:
        """Raises ValueError where a budget cannot be spent on what stages leave open together."""
        opened = {str(stage.opens): stage.stage for stage in self.stages if stage.opens}
        if {"ranks", "types"} & {*opened} and len(opened) > 1:
            name = next(iter(opened.values()))
            raise ValueError(f"a budget is spent on widths, ranks or types; tell {name} how much to keep")
        if "types" in opened and self.budget is not None and self.budget.target_size is None:
            raise ValueError("types of a GGUF file are found under bytes; give the budget a target_size")
        budget, usual = self.budget, Budget.model_fields
        names = ("trials", "trial_seconds") if budget is not None else ()
        changed = [name for name in names if getattr(budget, name) != usual[name].default]
        if changed and "types" not in opened:
            raise ValueError(
                f"{changed[0]} is for types of a GGUF file; shapes and ranks have three trials. Leave it out"
            )

    def _check_order(self) -> None:
        """Raises ValueError where a stage lacks another before it."""
        names = [stage.stage for stage in self.stages]
        for position, stage in enumerate(self.stages):
            if position and stage.site is Depth:
                raise ValueError(f"{stage.stage} comes first; the order is {', '.join(names)}")
            for earlier in stage.after:
                if not set(earlier.split(" or ")) & set(names[:position]):
                    raise ValueError(f"{stage.stage} needs {earlier} before it; the order is {', '.join(names)}")

    def _check_inputs(self) -> None:
        """Raises ValueError where a stage goes by the dense model's inputs and another changes what these are."""
        dense = [stage.stage for stage in self.stages if stage.requires.inputs == "dense"]
        others = [stage.stage for stage in self.stages if stage.requires.inputs != "dense"]
        if dense and others:
            raise ValueError(
                f"{dense[0]} goes by the dense model's inputs, so {others[0]} cannot be beside it; "
                f"give {dense[0]} inputs: compressed"
            )

    @property
    def trial_samples(self) -> int:
        """Windows of each trial."""
        given = None if self.budget is None else self.budget.trial_samples
        return min(self.calibration.samples, given or max(LEAST_TRIAL, self.calibration.samples // 4))

    @property
    def held_out_windows(self) -> int:
        """How many of the calibration windows stages choose on: their share, but at least one."""
        share = max(stage.requires.held_out for stage in self.stages)
        return max(1, int(share * self.calibration.samples)) if share else 0


def parse_stage(entry: Any) -> StageConfig:
    name = entry.get("stage") if isinstance(entry, dict) else None
    if name not in stages.names():
        raise ValueError(unknown_name("stage", str(name), stages.names()))
    return stages.stage_class(name).model_validate(entry)


Where = tuple[int | str, ...]  # the way to a value: names of keys, places in lists
Place = Callable[[Where], str]


@dataclass(frozen=True)
class Problem:
    where: Where
    what: str


def dotted(where: Where) -> str:
    return ".".join(str(step) for step in where)


def parse_recipe(data: Any, place: Place = dotted) -> Recipe:
    """A recipe from plain data. `place` says where a problem is. Raises UsageError with every problem, a line each."""
    problems: list[Problem] = []
    if isinstance(data, dict) and isinstance(data.get("stages"), list | tuple):
        data = data | {"stages": parse_stages(data["stages"], problems)}
    in_stages = bool(problems)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        # With a stage missing, nothing can be said about their order.
        problems += [problem for problem in described(error, Recipe) if not in_stages or problem.where]
    if problems:
        lines = dict.fromkeys((place(problem.where), problem.what) for problem in problems)
        raise UsageError("\n".join(f"{where}: {what}" if where else what for where, what in lines))
    return recipe


def parse_stages(entries: Sequence[Any], problems: list[Problem]) -> list[StageConfig]:
    """The stages that can be parsed; what is wrong with the others goes to `problems`."""
    parsed = []
    for position, entry in enumerate(entries):
        try:
            parsed.append(entry if isinstance(entry, StageConfig) else parse_stage(entry))
        except ValidationError as error:
            found = described(error, stages.stage_class(entry["stage"]))
            problems += [Problem(("stages", position, *problem.where), problem.what) for problem in found]
        except ValueError as error:
            problems.append(Problem(("stages", position), str(error)))
    return parsed


def described(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    found = []
    for problem in error.errors():
        what, where = problem["msg"].removeprefix("Value error, "), problem["loc"]
        if problem["type"] == "extra_forbidden":
            what = unknown_name("key", str(where[-1]), fields_at(model, where[:-1]))
        found.append(Problem(where, what))
    return found


def fields_at(model: type[BaseModel], where: Where) -> list[str]:
    """The keys that a mapping in a recipe can have."""
    for step in where:
        inside = model.model_fields[str(step)].annotation
        model = next(each for each in (inside, *get_args(inside)) if isclass(each) and issubclass(each, BaseModel))
    return list(model.model_fields)
