"""The shipped recipes, by the names of their files: what the commands start from, and what `compress run NAME` runs."""

from pathlib import Path
from typing import Any

import yaml

from compress.errors import UsageError, unknown_name

FOLDER = Path(__file__).parent


def names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def path_of(name: str) -> Path:
    """Raises UsageError for a name that is none."""
    if name not in names():
        raise UsageError(f"{unknown_name('recipe', name, names())} Or name a file.")
    return FOLDER / f"{name}.yaml"


def load(name: str) -> dict[str, Any]:
    """The recipe as plain data."""
    data: dict[str, Any] = yaml.safe_load(path_of(name).read_text(encoding="utf-8"))
    return data
