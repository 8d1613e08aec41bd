"""A recipe: which stages, on which calibration text, from which seed. With the model it determines the output.

It comes from plain data, from YAML that people write, with the line of every problem, or from the compress.json of a
checkpoint, which holds the one it is of.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import isclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, SerializeAsAny, ValidationError, field_validator, model_validator

from compress import presets, stages
from compress.calibration.depth import Depth
from compress.checkpoints.metadata import METADATA
from compress.errors import UsageError, unknown_name
from compress.models.untrusted import parse_json, parse_yaml, reading
from compress.numerics import DTYPES
from compress.stages._stage import StageConfig, Strict

LEAST_TRIAL = 8  # windows
LARGEST = 10**7  # bytes of a compress.json; a large model's has a few million
LARGEST_YAML = 10**5  # bytes of a recipe, which has some hundred: yaml takes seconds for more
INTEGER = "tag:yaml.org,2002:int"
MOST_DIGITS = 20
RENAMED = {  # keys of earlier versions
    "bits": "num_bits",
    "floating": "type: float",
    "group": "group_size, and strategy for tensor, channel or block",
    "act_order": "actorder: weight",
    "inputs": "input_activations",
}
MOST_VALUES = 10_000  # a few lines of YAML that refer to one another can stand for billions


class Calibration(Strict):
    """The calibration text. source: a data set or a text file. samples: windows. seq_len: tokens a window."""

    source: str
    samples: Annotated[int, Field(ge=1)] = 128
    seq_len: Annotated[int, Field(ge=2)] = 2048


class Budget(Strict):
    """What the result may come to, a promise. Widths that the stages leave open are chosen under it.

    keep_params: a share of the dense model's parameters, a tied head counted once.
    target_size: bytes of the safetensors files on disk, or of the GGUF file.
    target_latency: a share of the time that a token takes to decode in the dense model, in llama.cpp on this machine.
    trial_samples: windows of each trial of a way to spend it, a quarter of them held out. Default: a quarter of all.
    trials, trial_seconds: how many sets of types of matrices are tried, and how long at most. Default: none, what the
        survey predicts is taken.
    allocation: `uniform`, as many neurons in every block, or `free`: as many in all, where the loss feels them most.
        The result then has no stock shape.
    """

    keep_params: Annotated[float, Field(gt=0, lt=1)] | None = None
    target_size: Annotated[int, Field(ge=1)] | None = None
    target_latency: Annotated[float, Field(gt=0, lt=1)] | None = None
    trial_samples: Annotated[int, Field(ge=8)] | None = None
    trials: Annotated[int, Field(ge=0)] = 0
    trial_seconds: Annotated[float, Field(gt=0)] | None = None
    allocation: Literal["uniform", "free"] = "uniform"

    @model_validator(mode="after")
    def _one_limit(self) -> "Budget":
        if [self.keep_params, self.target_size, self.target_latency].count(None) != 2:
            raise ValueError("a budget is keep_params, target_size or target_latency, one of them")
        if self.trial_seconds is not None and not self.trials:
            raise ValueError("trial_seconds limits trials; say how many there are at most (--trials 20)")
        return self


class Recipe(Strict):
    """Stages in their order, the calibration text, a budget.

    method: the name the result goes by. budget: what decides the widths that stages leave open.
    dtype: of the written weights, None for the input's own.
    """

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
        self._check_opens()
        dense = [stage.stage for stage in self.stages if stage.requires.inputs == "dense"]
        others = [stage.stage for stage in self.stages if stage.requires.inputs != "dense"]
        if dense and others:
            raise ValueError(
                f"{dense[0]} goes by the dense model's inputs, so {others[0]} cannot be beside it; "
                f"give {dense[0]} inputs: compressed"
            )
        if self.held_out_windows >= self.calibration.samples:
            raise ValueError("a stage holds calibration windows out of its fit; it needs 2 samples at least")
        return self

    def _check_order(self) -> None:
        """Raises ValueError where a stage lacks another before it."""
        names = [stage.stage for stage in self.stages]
        for position, stage in enumerate(self.stages):
            if position and stage.site is Depth:
                raise ValueError(f"{stage.stage} comes first; the order is {', '.join(names)}")
            for earlier in stage.after:
                if not set(earlier.split(" or ")) & set(names[:position]):
                    raise ValueError(f"{stage.stage} needs {earlier} before it; the order is {', '.join(names)}")

    def _check_opens(self) -> None:
        """Raises ValueError where a budget cannot be spent on what stages leave open."""
        opened = {stage.opens: stage.stage for stage in self.stages if stage.opens}
        budget, name = self.budget, next(iter(opened.values()), "")
        if budget is None:
            if opened:
                raise ValueError(f"{name} is not told how much to keep; give it a ratio, or the recipe a budget")
            return
        if not opened:
            raise ValueError("the recipe has a budget, but every stage says how much it keeps; leave one open")
        if {"ranks", "types"} & {*opened} and len(opened) > 1 and {*opened} != {"blocks", "types"}:
            raise ValueError(f"a budget is spent on widths, ranks or types; tell {name} how much to keep")
        if "types" in opened and budget.keep_params is not None:
            raise ValueError("types of matrices are found under bytes; give the budget a target_size")
        is_gguf = any(stage.opens == "types" and getattr(stage, "form", None) == "gguf" for stage in self.stages)
        if budget.target_latency is not None and not is_gguf:
            raise ValueError("target_latency is measured in llama.cpp, for types of a GGUF file; give a target_size")
        stores = any(stage.in_written_form for stage in self.stages)
        for rule in () if stores else ("trials", "trial_seconds"):
            if getattr(budget, rule) != Budget.model_fields[rule].default:
                raise ValueError(f"{rule} is for types of matrices; shapes and ranks have three trials. Leave it out")
        if budget.allocation == "free" and "neurons" not in opened:
            raise ValueError(
                "allocation free lets the budget decide the neurons of each block; "
                "leave out prune_units' ratio (--mlp-ratio)"
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


Where = tuple[int | str, ...]  # the way to a value: names of keys, places in lists
Place = Callable[[Where], str]
Problem = tuple[Where, str]  # what is wrong, and where


def parse_stage(entry: Any) -> StageConfig:
    name = entry.get("stage") if isinstance(entry, dict) else None
    if name not in stages.classes():
        raise ValueError(unknown_name("stage", str(name), stages.classes()))
    return stages.classes()[name].model_validate(entry)


def dotted(where: Where) -> str:
    return ".".join(map(str, where))


def parse_recipe(data: Any, place: Place = dotted) -> Recipe:
    """A recipe from plain data. `place` says where a problem is. Raises UsageError with every problem, a line each."""
    problems: list[Problem] = []
    if isinstance(data, dict) and isinstance(data.get("stages"), list | tuple):
        parsed = []
        for position, entry in enumerate(data["stages"]):
            try:
                parsed.append(entry if isinstance(entry, StageConfig) else parse_stage(entry))
            except ValidationError as error:
                found = described(error, stages.classes()[entry["stage"]])
                problems += [(("stages", position, *where), what) for where, what in found]
            except ValueError as error:
                problems.append((("stages", position), str(error)))
        data = data | {"stages": parsed}
    in_stages = bool(problems)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        # With a stage missing, nothing can be said about their order.
        problems += [(where, what) for where, what in described(error, Recipe) if where or not in_stages]
    if problems:
        lines = dict.fromkeys((place(where), what) for where, what in problems)
        raise UsageError("\n".join(f"{where}: {what}" if where else what for where, what in lines))
    return recipe


def described(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """What pydantic found, with the nearest of the keys that there are for one that is not known."""
    found = []
    for problem in error.errors():
        what, where, owner = problem["msg"].removeprefix("Value error, "), problem["loc"], model
        if problem["type"] == "extra_forbidden":
            for step in where[:-1]:
                kind = owner.model_fields[str(step)].annotation
                owner = next(each for each in (kind, *get_args(kind)) if isclass(each) and issubclass(each, BaseModel))
            name, known = str(where[-1]), owner.model_fields
            new = RENAMED.get(name, "")
            what = f"{name!r} is now {new}." if re.split(r"\W", new)[0] in known else unknown_name("key", name, known)
        found.append((where, what))
    return found


# Recipes in files.


@dataclass(frozen=True)
class RecipeFile:
    """A recipe as it was read from a file.

    data: to be completed by options and given to `parse_recipe`. lines: of the file, by where a value is.
    facts: all that a compress.json says; None where the file is a recipe alone.
    """

    file: Path
    data: dict[str, Any]
    lines: Mapping[Where, int] = field(default_factory=dict)
    facts: Mapping[str, Any] | None = None

    def place(self, where: Where) -> str:
        """The line of a value, or of the nearest that it is in."""
        nearest = next((where[:end] for end in range(len(where), 0, -1) if where[:end] in self.lines), ())
        line = f":{self.lines[nearest]}" if nearest else ""
        return f"{self.file.name}{line}" + (f": {dotted(where)}" if where else "")


def read_recipe(path: Path) -> RecipeFile:
    """Read a recipe.

    path: a YAML file, a compress.json, a folder that has one, or the name of a preset. Raises UsageError where it is
        none of them.
    """
    if not path.exists() and not path.suffix and len(path.parts) == 1:
        path = presets.path_of(path.name)
    file = path / METADATA if path.is_dir() else path
    is_json = file.suffix == ".json"
    try:
        if file.stat().st_size > (LARGEST if is_json else LARGEST_YAML):
            raise UsageError(f"{file} is too large for a recipe ({file.stat().st_size / 1e6:.1f} MB).")
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The recipe {file} cannot be read: {' '.join(str(error).split())}") from error
    if is_json:
        try:
            facts = parse_json(text)
        except ValueError as error:
            raise UsageError(f"{file} is no JSON ({error}). Name a recipe or the folder of a checkpoint.") from error
        if not isinstance(facts, dict) or not isinstance(facts.get("recipe"), dict):
            raise UsageError(f"{file} has no recipe in it. Name a YAML recipe or the compress.json of a checkpoint.")
        return RecipeFile(file, facts["recipe"], facts=facts)
    lines: dict[Where, int] = {}
    with reading(f"The recipe {file} cannot be read", kind=UsageError):
        data, node = parse_yaml(text)
        if node is not None:
            note_lines(node, (), lines, file)
    if not isinstance(data, dict):
        raise UsageError(f"The recipe {file} is no mapping. Start it with 'method:' and 'stages:'.")
    return RecipeFile(file, data, lines)


def note_lines(node: yaml.Node, where: Where, lines: dict[Where, int], file: Path) -> None:
    """Where each value begins. Raises UsageError for a key that is there twice, of which YAML would take the last."""
    if len(lines) > MOST_VALUES:
        raise UsageError(f"{file.name} has more than {MOST_VALUES:,} values, some of them by reference. Write less.")
    if isinstance(node, yaml.ScalarNode) and node.tag == INTEGER and len(node.value) > MOST_DIGITS:
        raise UsageError(f"{file.name}:{node.start_mark.line + 1}: {dotted(where)} has too many digits. Write fewer.")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            at = (*where, str(key.value))
            if at in lines:
                raise UsageError(f"{file.name}:{key.start_mark.line + 1}: {dotted(at)} is there twice. Leave one out.")
            lines[at] = key.start_mark.line + 1
            note_lines(value, at, lines, file)
    elif isinstance(node, yaml.SequenceNode):
        for position, value in enumerate(node.value):
            lines[*where, position] = value.start_mark.line + 1
            note_lines(value, (*where, position), lines, file)


def comparison(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """What two runs of one recipe have come to, from their compress.json: the same bytes, or why not."""
    tuning = first.get("tuning")
    if isinstance(tuning, dict):
        untuned = comparison({**first, "tuning": None, "parts": tuning.get("compressed_parts")}, second)
        return f"The checkpoint was tuned afterwards, by compress finetune; this is the one before that. {untuned}"
    parts = first.get("parts")
    if isinstance(parts, dict) and [*parts.values()] == [
        *second["parts"].values()
    ]:  # a GGUF file is called as its folder
        return "The same bytes as those of the checkpoint that the recipe is of."
    known = first.get("fingerprints")
    before = known if isinstance(known, dict) else {}
    causes = [
        *(name for name, value in second["fingerprints"].items() if before.get(name) != value),
        *(name for name in ("recipe", "versions", "device") if first.get(name) != second[name]),
    ]
    unlike = ", ".join(causes) or "nothing that is known"
    return f"Other bytes than those of the checkpoint that the recipe is of; the two are unlike in {unlike}."


def as_yaml(recipe: Recipe) -> str:
    """The recipe with everything said, as `read_recipe` reads it."""
    data = recipe.model_dump(mode="json", exclude_none=True)
    data["stages"] = [{"stage": entry["stage"], **entry} for entry in data["stages"]]
    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
    return text
