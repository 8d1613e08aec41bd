"""Files that are there whole or not at all, whenever a process is killed, and that are on the disk when it says so."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """The path to write to: at the end of the block, what lies there becomes `file`, in the place of what was there.

    If the block fails nothing has changed. Raises OSError.
    """
    unfinished = file.with_name(f"{file.name}.unfinished")
    try:
        yield unfinished
        flush(unfinished)
        unfinished.replace(file)
        flush(file.parent)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """What a file holds, or which names a folder holds, onto the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no such thing for folders.
        if not (path.is_dir() and error.errno == errno.EINVAL):
            raise
    finally:
        os.close(descriptor)


def flush_below(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        flush(path)


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """One process at a time, of those on this machine that change names in a folder; the others wait."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
