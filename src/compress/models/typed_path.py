"""A path as a user types it, or as a file says it."""

from pathlib import Path

from compress.errors import UsageError


def typed_path(name: str) -> Path:
    """With ~ expanded. Raises UsageError for what no path on this machine can be, and for what may not be looked at."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{name[:100]!r} cannot be used as a path: {reason}. Correct it.") from error
    return path
