"""The place of an output: looked at before a run, then held by its lock until the output has its name."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from compress.checkpoints.facts import FACTS
from compress.durable import in_turn
from compress.errors import OutputError, UsageError
from compress.publishing import Output, aside_of, discard, give_back, none_left_empty
from compress.streaming.journal import LOCK, Journal, clear, take_lock

logger = logging.getLogger("compress")


def check_output(job: Output) -> None:
    if job.out.name in ("", ".."):
        raise UsageError(f"--out {job.out} has no name of its own. Name a new folder, such as --out compressed/mine.")
    if job.model.folder is not None:
        model, out = job.model.folder.resolve(), job.out.resolve()
        if out == model or out in model.parents:
            raise UsageError(f"The output {job.out} would replace the model it is made from. Choose another --out.")
    if job.out.is_symlink() and not job.out.exists():
        raise UsageError(f"The output {job.out} is a link to nowhere. Choose another --out.")
    for folder in (job.out, aside_of(job.out)):
        if job.overwrite and folder.exists() and not is_replaceable(folder):
            raise UsageError(
                f"{folder} is not of this program (it has no compress.json), so --overwrite leaves it alone. "
                "Choose another --out."
            )
    if job.out.exists() and not job.overwrite:
        raise UsageError(f"The output {job.out} exists. Choose another --out, or replace it with --overwrite.")
    if job.partial.exists() and not (job.resume or job.overwrite):
        raise UsageError(f"An unfinished run is in {job.partial}. Go on with --resume, or start over with --overwrite.")


def is_replaceable(folder: Path) -> bool:
    return folder.is_dir() and ((folder / FACTS).is_file() or not any(folder.iterdir()))


@contextmanager
def parent_folder(partial: Path) -> Iterator[None]:
    """The folder that the output lies in. What had to be made for it goes again if nothing is kept there."""
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


@contextmanager
def claimed(job: Output) -> Iterator[IO[str]]:
    """The lock of the partial folder. What another run has left or made since we looked at the output is seen to."""
    aside = aside_of(job.out)
    try:
        with in_turn(job.partial.parent):
            give_back(job)
            check_output(job)
            job.partial.mkdir(exist_ok=True)
            lock = take_lock(job.partial)
        with lock, none_left_empty(job.partial, lock):
            if aside.exists():
                # The old output of a replacement that was killed after its end. It goes where only we look.
                aside.rename(job.partial / aside.name)
            discard(job.partial / aside.name)
            yield lock
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{job.partial} cannot be written ({error}). Free space or choose another --out; "
            "what was finished is kept for --resume."
        ) from error


@contextmanager
def kept_journal(partial: Path, run: dict[str, Any], lock: IO[str], *, resume: bool) -> Iterator[Journal]:
    """The journal of a run; one that ends before its first part leaves no folder behind.

    resume: go on from what an earlier run has left in the folder; where that is nothing, start, and warn.
    """
    nothing_left = all(file.name == LOCK for file in partial.iterdir())
    if resume and nothing_left:
        logger.warning("--resume: there is no unfinished run in %s. Starting from the beginning.", partial)
    journal = (Journal.resume if resume and not nothing_left else Journal.start)(partial, run, lock)
    try:
        yield journal
    finally:
        if journal.is_empty and partial.exists():
            clear(partial, kept={LOCK})
