"""Files that are written whole or not at all, and what is known of a written file: its name, size and sha256."""

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from compress.errors import OutputError

GGUF = "model.gguf"  # in the folder that stands for a GGUF file, a link to it


class WrittenFile(BaseModel):
    """A file that was written whole. file: its name in its folder. bytes: its size."""

    model_config = ConfigDict(frozen=True, strict=True)
    file: str
    bytes: int
    sha256: str


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """Give a temporary path to write to, flushed and renamed to `file` at the end of the block.

    If the block fails, `file` is as it was. Raises OSError.
    """
    unfinished = file.with_name(f"{file.name}.unfinished")
    try:
        yield unfinished
        fsync(unfinished)
        unfinished.replace(file)
        fsync(file.parent)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> WrittenFile:
    """Write a safetensors file atomically. Raises OutputError when the disk is full or may not be written."""
    try:
        with atomic_write(file) as unfinished:
            detached = {name: tensor.detach() for name, tensor in tensors.items()}
            save_file(detached, unfinished, metadata={"format": "pt"})
            unfinished.chmod(new_file_mode())  # safetensors makes files that only their owner may read
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{file} cannot be written ({error}). Free space or choose another --out; --resume goes on from here."
        ) from error
    return WrittenFile(file=file.name, bytes=file.stat().st_size, sha256=sha256(file))


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def version_of(file: Path) -> tuple[int, ...]:
    """Identify a file's version: it changes when the file is rewritten or replaced."""
    stat = file.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def new_file_mode() -> int:
    """The mode that the user's umask gives a new file."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def fsync(path: Path) -> None:
    """Flush the content of a file, or the names in a folder, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush folders.
        if not (path.is_dir() and error.errno == errno.EINVAL):
            raise
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        fsync(path)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Let one process of this machine at a time change the names in a folder; the others wait."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
