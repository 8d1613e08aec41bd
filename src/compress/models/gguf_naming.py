"""From what a user types to a GGUF file."""

from pathlib import Path

from compress.errors import UsageError
from compress.models.typed_path import typed_path

SUFFIX = ".gguf"


def find_gguf(name: str) -> Path | None:
    """The file that is meant: named itself, or alone in a folder that is no model otherwise."""
    path = typed_path(name)
    if path.suffix.lower() == SUFFIX and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    files = sorted(path.glob(f"*{SUFFIX}"))
    if len(files) > 1:
        raise UsageError(f"{path} has {len(files)} GGUF files. Name one, such as {files[0]}.")
    return files[0] if files else None
