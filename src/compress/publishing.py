"""How an output gets its name, and what the next run finds of one that was killed meanwhile.

    OUT             the output: the old one or the new one, whole
    OUT.partial     an unfinished run, or one that is finished and only lacks the name
    OUT.replaced    between two renames, the old output, whole

Names are only changed in turn (`in_turn` of the folder that OUT lies in), so nobody alive is between the two renames
when another run looks.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Protocol, runtime_checkable

from compress.checkpoints.facts import FACTS
from compress.durable import flush, in_turn
from compress.models.hub import ModelSource
from compress.streaming.journal import JOURNAL, LOCK


@runtime_checkable
class Output(Protocol):
    """What a job says of the folder that it writes, and of the model that it is made from."""

    @property
    def model(self) -> ModelSource: ...

    @property
    def out(self) -> Path: ...

    @property
    def partial(self) -> Path: ...

    @property
    def resume(self) -> bool: ...

    @property
    def overwrite(self) -> bool: ...


def aside_of(out: Path) -> Path:
    """Where an output that is replaced waits until the new one has its name."""
    return out.with_name(f"{out.name}.replaced")


def publish(partial: Path, out: Path) -> None:
    """Give the finished folder its name. An output to be replaced is moved aside first and deleted last.

    Whatever ends the process: the output is the old one, or the new one, or the old one is whole beside the new one's
    folder, and the next run gives one of them the name.
    """
    aside = aside_of(out)
    with in_turn(out.parent):
        (partial / LOCK).unlink(missing_ok=True)
        with moved_aside(out, aside):
            partial.rename(out)
        flush(out.parent)
        if aside.exists():
            # By the name that is free again: what is left of it when this is interrupted is the next run's to clear.
            aside.rename(partial)
            discard(partial)


@contextmanager
def moved_aside(out: Path, aside: Path) -> Iterator[None]:
    """What bears a name makes way for what gets it in the block, and comes back if that fails."""
    if not out.exists():
        yield
        return
    try:
        out.rename(aside)
        yield
    except BaseException:
        if aside.exists() and not out.exists():
            aside.rename(out)
        raise


def discard(folder: Path) -> None:
    """Delete an output if it is there; first what says that it is one, so that what is left never looks whole."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        (folder / FACTS).unlink(missing_ok=True)
        shutil.rmtree(folder)


def give_back(job: Output) -> None:
    """An output that had made way for one that never got its name has its own again; unless that one is about to."""
    aside = aside_of(job.out)
    is_ours = aside.is_dir() and (aside / FACTS).is_file()
    if is_ours and not job.out.exists() and not (job.resume and is_finished(job.partial)):
        aside.rename(job.out)


def is_finished(partial: Path) -> bool:
    """Whether a run has ended but for the name of its output: its journal goes last."""
    return (partial / FACTS).is_file() and not (partial / JOURNAL).exists()


@contextmanager
def none_left_empty(partial: Path, lock: IO[str]) -> Iterator[None]:
    """A folder in which nothing but the lock is left goes too, if it is still the one with that lock."""
    try:
        yield
    finally:
        with in_turn(partial.parent), suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), (partial / LOCK).stat()) and len(list(partial.iterdir())) == 1:
                shutil.rmtree(partial)
