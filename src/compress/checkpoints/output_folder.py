"""The place of an output: whether it may be written, its lock, and the renames that put a new output there.

    OUT             the old output or the new one, whole
    OUT.partial     the run that makes the new one, locked by the process that writes
    OUT.replaced    between two renames, the old output, whole

Names are changed under a lock of the folder that OUT lies in, so no other run sees the state between two renames.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from compress.checkpoints.metadata import METADATA
from compress.errors import OutputError, UsageError
from compress.io import exclusive, fsync
from compress.models.hub import ModelSource

LOCK = "lock"


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a job says of its output folder. model: that the output is made from."""

    model: ModelSource
    out: Path
    resume: bool = False
    overwrite: bool = False

    @property
    def partial(self) -> Path:
        return self.out.parent / f"{self.out.name}.partial"


def check_output(job: Output) -> None:
    if job.out.name in ("", ".."):
        raise UsageError(f"--out {job.out} has no name of its own. Name a new folder, such as --out compressed/mine.")
    if job.model.folder is not None:
        model, out = job.model.folder.resolve(), job.out.resolve()
        if out == model or out in model.parents:
            raise UsageError(f"The output {job.out} would replace the model it is made from. Choose another --out.")
    if job.out.is_symlink() and not job.out.exists():
        raise UsageError(f"The output {job.out} is a link to nowhere. Choose another --out.")
    for folder in (job.out, backup_path(job.out)):
        is_empty = folder.is_dir() and not any(folder.iterdir())
        if job.overwrite and folder.exists() and not is_empty and not (folder / METADATA).is_file():
            raise UsageError(
                f"{folder} is not of this program (it has no {METADATA}), so --overwrite leaves it alone. "
                "Choose another --out."
            )
    if job.out.exists() and not job.overwrite:
        raise UsageError(f"The output {job.out} exists. Choose another --out, or replace it with --overwrite.")
    if job.partial.exists() and not (job.resume or job.overwrite):
        raise UsageError(f"An unfinished run is in {job.partial}. Go on with --resume, or start over with --overwrite.")


@contextmanager
def locked(job: Output, *, will_publish: bool) -> Iterator[None]:
    """Make OUT.partial and hold its lock; folders that are left empty are removed again.

    The output is checked once more, as another run may have made it meanwhile.
    will_publish: the new output is complete, so an old one that was moved aside for it is not restored.
    """
    with parent_folder(job.partial):
        try:
            with exclusive(job.partial.parent):
                backup = backup_path(job.out)
                if not will_publish and not job.out.exists() and backup.is_dir() and (backup / METADATA).is_file():
                    backup.rename(job.out)  # a replacement was interrupted between its two renames
                check_output(job)
                job.partial.mkdir(exist_ok=True)
                lock = take_lock(job.partial)
            with lock, removed_if_empty(job.partial, lock):
                if job.out.exists():
                    delete_backup(job.out, job.partial)
                yield
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"{job.partial} cannot be written ({error}). Free space or choose another --out; "
                "what was finished is kept for --resume."
            ) from error


@contextmanager
def parent_folder(partial: Path) -> Iterator[None]:
    made = [folder for folder in partial.absolute().parents if not folder.exists()]
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{partial.parent} cannot be made ({error}). Choose another --out.") from error
    try:
        yield
    finally:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


def take_lock(partial: Path) -> IO[str]:
    lock = (partial / LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise UsageError(f"Another run is writing {partial}. Wait for it, or choose another --out.") from error
    return lock


@contextmanager
def removed_if_empty(partial: Path, lock: IO[str]) -> Iterator[None]:
    """Remove the folder at the end if it has nothing but the lock in it, and the lock is still this one."""
    try:
        yield
    finally:
        with exclusive(partial.parent), suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), (partial / LOCK).stat()) and len(list(partial.iterdir())) == 1:
                shutil.rmtree(partial)


def publish(checkpoint: Path, out: Path, partial: Path) -> None:
    """Rename a finished checkpoint to OUT. An old output is moved aside first and deleted last.

    Whenever the process is killed, OUT is the old output or the new one, or the next run restores the old one.
    """
    with exclusive(out.parent):
        is_replaced = out.exists()
        if is_replaced:
            out.rename(backup_path(out))
        try:
            checkpoint.rename(out)
        except BaseException:
            if is_replaced:
                backup_path(out).rename(out)
            raise
        fsync(out.parent)
        delete_backup(out, partial)


def backup_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.replaced")


def delete_backup(out: Path, partial: Path) -> None:
    """Delete an old output. It is moved first, as one that is half deleted must not be restored."""
    backup = backup_path(out)
    if backup.is_symlink():
        backup.unlink()
    elif backup.exists():
        left = partial / backup.name
        backup.rename(left)
        shutil.rmtree(left)
