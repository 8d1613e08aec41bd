"""Recipes in files: YAML that people write, and the compress.json of every checkpoint, which holds the one it is of."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from compress import presets
from compress.checkpoints.metadata import METADATA
from compress.errors import UsageError
from compress.models.untrusted import parse_json, parse_yaml, reading
from compress.recipe import Recipe, Where, dotted

LARGEST = 10**7  # bytes of a compress.json; a large model's has a few million
LARGEST_YAML = 10**5  # bytes of a recipe, which has some hundred: yaml takes seconds for more
INTEGER = "tag:yaml.org,2002:int"
MOST_DIGITS = 20
MOST_VALUES = 10_000  # a few lines of YAML that refer to one another can stand for billions


@dataclass(frozen=True)
class RecipeFile:
    """
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
    """
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
    return from_facts(file, text) if is_json else from_yaml(file, text)


def from_facts(file: Path, text: str) -> RecipeFile:
    try:
        facts = parse_json(text)
    except ValueError as error:
        raise UsageError(f"{file} is no JSON ({error}). Name a recipe or the folder of a checkpoint.") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("recipe"), dict):
        raise UsageError(f"{file} has no recipe in it. Name a YAML recipe or the compress.json of a checkpoint.")
    return RecipeFile(file, facts["recipe"], facts=facts)


def from_yaml(file: Path, text: str) -> RecipeFile:
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
