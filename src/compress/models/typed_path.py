"""Check a path that a user typed or a file names."""

from pathlib import Path

from compress.errors import UsageError


def typed_path(name: str) -> Path:
    """Expand ~. Raises UsageError for what cannot be a path on this machine, or may not be accessed."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{name[:100]!r} cannot be used as a path: {reason}. Correct it.") from error
    return path
