"""The recipe of a command: a shipped one, changed by flags and by --set, then completed and checked.

A change has an address: `STAGE.FIELD` such as `factorize.multiple` or `slim.quantize.actorder`; `stages.2.keep` where
a stage is there twice, `calibration.FIELD`, `budget.FIELD`, `seed` or `dtype`. What a value may be is said by the
recipe and its stages alone: what they refuse is reported with the flag that put it there.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from compress import presets
from compress.cli.options import flag_of
from compress.errors import Problems, UsageError, unknown_name
from compress.models.untrusted import parse_json

if TYPE_CHECKING:
    from compress.recipe import Place, Recipe, Where

TOP = ("budget", "calibration", "dtype", "seed")  # besides stages, what can be set
EXAMPLE = "--set refit.held_out=0.25"
Key = tuple[int | None, tuple[Any, ...]]  # of a value: its owner (a stage's identity, None for the recipe), the fields


class Draft:
    """A recipe as plain data.

    place: of a value in the file that the recipe is from. flags: what was typed for a value; removed: for what was
    taken out.
    """

    def __init__(self, data: Mapping[str, Any], place: "Place | None" = None) -> None:
        self.data = deepcopy(dict(data))
        self.from_file = place
        self.flags: dict[Key, str] = {}
        self.removed: dict[Key, str] = {}

    @classmethod
    def preset(cls, name: str) -> "Draft":
        """A shipped recipe, with the calibration left to the command."""
        data = presets.load(name)
        return cls({key: value for key, value in data.items() if key not in ("calibration", "seed")})

    @property
    def stages(self) -> list[Any]:
        found = self.data.get("stages")
        return found if isinstance(found, list) else []

    def stage(self, name: str, flag: str = "") -> dict[str, Any]:
        """The stage of that name. Raises UsageError where there is none, or more than one."""
        found = [entry for entry in self.stages if isinstance(entry, dict) and entry.get("stage") == name]
        if len(found) == 1:
            only: dict[str, Any] = found[0]
            return only
        if not found:
            names = [str(entry.get("stage")) for entry in self.stages if isinstance(entry, dict)]
            raise UsageError(f"{flag}: {unknown_name('stage', name, {*names, *TOP})}")
        places = " or ".join(f"stages.{self.stages.index(entry)}" for entry in found)
        raise UsageError(f"{flag}: the recipe has {len(found)} stages {name!r}. Name one by its place: {places}.")

    def set(self, address: str, value: Any, flag: str) -> None:
        """Put a value at an address; None leaves what is there. flag: what was typed, for messages."""
        if value is None:
            return
        owner, key, field = self._find(address, flag)
        for (of, path), other in self.removed.items():
            if of == key[0] and key[1][: len(path)] == path:
                raise UsageError(f"{flag} has no effect with {other}. Leave one out.")
        if key in self.flags:
            raise UsageError(f"{self.flags[key]} and {flag} both set {address}. Leave one out.")
        self.flags[key] = flag
        owner[field] = value

    def remove(self, address: str, flag: str) -> None:
        """Leave out what is at an address; to set something below it afterwards is a problem."""
        owner, key, field = self._find(address, flag)
        owner.pop(field, None)
        self.removed[key] = flag

    def remove_stage(self, name: str) -> None:
        self.data["stages"] = [entry for entry in self.stages if entry["stage"] != name]

    def _find(self, address: str, flag: str) -> tuple[dict[str, Any], Key, str]:
        """The mapping that a field is in, its key in `flags`, and the field."""
        first, *fields = address.split(".")
        owner = self.data
        if first == "stages" and fields and fields[0].isdigit():
            place = int(fields.pop(0))
            if place >= len(self.stages):
                raise UsageError(f"{flag}: the recipe has {len(self.stages)} stages, counted from 0.")
            owner = self.stages[place]
        elif first in TOP:
            fields = [first, *fields]
        else:
            owner = self.stage(first, flag)
        root = None if owner is self.data else id(owner)
        if not fields or not all(fields):
            raise UsageError(f"{flag}: name a field of {first}, such as {EXAMPLE}.")
        *between, last = fields
        for field in between:
            inside = owner.get(field)
            if inside is None:
                inside = owner[field] = {}
            if not isinstance(inside, dict):
                raise UsageError(f"{flag}: {field} is {inside!r} and has no fields.")
            owner = inside
        return owner, (root, tuple(fields)), last

    def place(self, where: "Where") -> str:
        """What a problem is about: the flag that set it, else its line in the file, else its address."""
        root, fields, name = None, tuple(where), []
        if len(where) > 1 and where[0] == "stages" and isinstance(where[1], int) and where[1] < len(self.stages):
            stage = self.stages[where[1]]
            root, fields, name = id(stage), tuple(where[2:]), [stage.get("stage") if isinstance(stage, dict) else stage]
        for (owner, path), flag in self.flags.items():
            if fields and owner == root and (path[: len(fields)] == fields or fields[: len(path)] == path):
                return flag
        return self.from_file(where) if self.from_file else ".".join(map(str, [*name, *fields]))

    def recipe(self, **calibration: Any) -> "Recipe":
        """The recipe. calibration: for the fields that are still open. Raises UsageError with all that is wrong."""
        from compress.recipe import parse_recipe

        told = self.data.get("calibration", {})
        completed = {**calibration, **told} if isinstance(told, dict) else told
        return parse_recipe({**self.data, "calibration": completed}, self.place)


def apply_settings(draft: Draft, settings: Sequence[str]) -> None:
    """Put in what --set says, `ADDRESS=VALUE`; a value is JSON, or the word itself. Raises all problems at once."""
    problems = Problems()
    for text in settings:
        with problems.collect():
            address, equals, value = text.partition("=")
            if not equals:
                raise UsageError(f"--set {text}: write STAGE.FIELD=VALUE, such as {EXAMPLE}.")
            draft.set(address.strip(), plain_value(value.strip()), f"--set {text}")
    problems.report()


def plain_value(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return text


def check_method(method: str, **options: Any) -> None:
    """Raises UsageError where options of our own method were given with another."""
    given = [name for name, value in options.items() if value is not None and (value is not False or name == "refit")]
    if given and method != "anchored":
        raise UsageError(f"{flag_of(given[0])} is an option of --method anchored, not of {method}. Leave it out.")
