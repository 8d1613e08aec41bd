"""quality.json: what was measured of a checkpoint, beside it."""

from pathlib import Path
from typing import Any

from compress.checkpoints.files import write_json
from compress.checkpoints.measures import QUALITY
from compress.durable import in_turn, whole
from compress.errors import CheckpointError, OutputError
from compress.models.json_text import parse_json
from compress.quality.measuring import Quality


def save(folder: Path, quality: Quality) -> Path:
    """Puts the measures into quality.json beside the checkpoint, whole or not at all.

    A measure that is in there already is replaced, others stay; each has its settings under its own name.
    """
    file = folder / QUALITY
    sections = quality.sections()
    try:
        # Another process may be adding its own measures.
        with in_turn(folder):
            kept = read_saved(file)
            settings = kept.get("settings", {}) | dict.fromkeys(sections, quality.settings)
            with whole(file) as unfinished:
                write_json(unfinished, kept | sections | {"settings": settings})
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error.strerror}. Free space or its folder.") from error
    return file


def read_saved(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        found = parse_json(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not isinstance(found.get("settings", {}), dict):
            raise TypeError
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: it is no JSON object of measures. Delete it.") from error
    return found
