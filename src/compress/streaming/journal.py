"""What a run has finished, on disk, so that a killed run goes on where it was.

The folder `<output>.partial` holds the finished parts, the state after the last of them, what was found before the
first part, and journal.jsonl: one line that says what the run is (recipe, input, calibration, versions), then one line
a finding or a finished part. A line is written after the files it speaks of have reached the disk; what has no line did
not happen. Each line bears a hash over itself and all lines before, so a line that was damaged, moved or taken out ends
the journal there. Opening the folder takes a lock, so two runs cannot share it.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.durable import flush, whole
from compress.errors import OutputError, UsageError
from compress.models.json_text import parse_json
from compress.models.tensor_files import is_own_name

JOURNAL = "journal.jsonl"
LOCK = "lock"
SEAL = "seal"


class Journal:
    """An open partial folder. `identity` is what must be equal for a run to continue another.

    lines: of the journal. findings: what was found before the first part, by name. entries: the finished parts.
    """

    def __init__(
        self, folder: Path, identity: dict[str, Any], lock: IO[str] | None, lines: list[dict[str, Any]]
    ) -> None:
        self.folder = folder
        self.identity = identity
        self.seal = lines[-1][SEAL]
        self.findings = {line["finding"]: line for line in lines if "finding" in line}
        self.entries = [line for line in lines[1:] if "finding" not in line]
        self._lock = lock

    @property
    def is_empty(self) -> bool:
        return not self.entries and not self.findings

    @classmethod
    def start(cls, folder: Path, identity: dict[str, Any], lock: IO[str] | None = None) -> "Journal":
        """A new run in the folder. What another left there goes, once nobody is writing it."""
        folder.mkdir(parents=True, exist_ok=True)
        with holding(folder, lock) as held:
            try:
                # As long as there is a journal, nobody takes what is left of another run for a finished one.
                (folder / JOURNAL).touch()
                clear(folder, kept={LOCK, JOURNAL})
                lines = rewritten(folder / JOURNAL, [{"run": identity}])
            except OSError:
                shutil.rmtree(folder)
                raise
        return cls(folder, identity, held, lines)

    @classmethod
    def resume(cls, folder: Path, identity: dict[str, Any], lock: IO[str] | None = None) -> "Journal":
        """Open a partial folder of the same run, or say in what the runs differ."""
        with holding(folder, lock) as held:
            lines = rewritten(folder / JOURNAL, cls._readable_lines(folder, identity))
            clear(folder, kept={LOCK, JOURNAL, *named_files(lines)})
            return cls(folder, identity, held, lines)

    @staticmethod
    def _readable_lines(folder: Path, identity: dict[str, Any]) -> list[dict[str, Any]]:
        lines = read_lines(folder / JOURNAL)
        if not lines or not isinstance(lines[0].get("run"), dict):
            raise UsageError(f"{folder} has no readable journal. Start over with --overwrite.")
        started = lines[0]["run"]
        differing = sorted(key for key in identity.keys() | started.keys() if identity.get(key) != started.get(key))
        if differing:
            raise UsageError(
                f"--resume: the run in {folder} had another {', '.join(said(key, started) for key in differing)}. "
                "Give the same options, or start over with --overwrite."
            )
        findings = [line for line in lines[1:] if "finding" in line]
        sound = [line for line in findings if all(file_is(folder, file) for file in line["files"])]
        # Without a finding the parts that came of it cannot be gone on from.
        entries = [line for line in lines[1:] if "finding" not in line] if sound == findings else []
        return [lines[0], *sound, *whole_entries(folder, entries)]

    def _write(self, line: dict[str, Any]) -> None:
        line |= {SEAL: seal_of(line, self.seal)}
        with (self.folder / JOURNAL).open("a", encoding="utf-8") as file:
            write_line(file, line)
        self.seal = line[SEAL]

    def note(
        self, name: str, data: Any, tensors: dict[str, Tensor] | None = None, files: Sequence[dict[str, Any]] = ()
    ) -> None:
        """Make a finding count: plain data, tensors if it has any, and files that were written on the way."""
        line = {"finding": name, "data": data, "files": list(files)}
        if tensors:
            line["files"].insert(0, write_tensors(self.folder / f"finding-{name}.safetensors", tensors))
        self._write(line)
        self.findings[name] = line

    def found_tensors(self, name: str) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = load_file(self.folder / self.findings[name]["files"][0]["file"])
        # Copies: tensors of a file lie unaligned, and products of matrices round differently there.
        return {key: tensor.clone() for key, tensor in tensors.items()}

    def record(self, entry: dict[str, Any], state: dict[str, Tensor]) -> None:
        """Make a finished part count: its state, then its line. The state before it is no longer needed."""
        number = len(self.entries)
        entry["state"] = write_tensors(self.folder / f"state-{number:05d}.safetensors", state)
        self._write(entry)
        for passed in state_files(self.entries[-1]) if self.entries else []:
            (self.folder / passed["file"]).unlink(missing_ok=True)
        self.entries.append(entry)

    def state(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = load_file(self.folder / self.state_file())
        return tensors

    def state_file(self) -> str:
        """The name of the file that this process goes on from."""
        name: str = self.entries[-1]["state"]["file"]
        return name

    def forget(self) -> None:
        """Leave only the parts, and the lock: the run is finished and its folder is about to become the output.

        The journal goes last: a folder without one, but with all else, is finished and only lacks its name.
        """
        passing = ("state-*", "finding-*", "adapter-*")
        written = [file for pattern in passing for file in self.folder.glob(f"{pattern}.safetensors")]
        for leftover in (*written, self.folder / JOURNAL):
            leftover.unlink(missing_ok=True)
        flush(self.folder)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()


def whole_entries(folder: Path, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The finished parts whose files are as they were written, up to the first that is not."""
    entries = []
    for line in lines:
        if not all(file_is(folder, written) for written in written_files(line)):
            break
        entries.append(line)
    while entries and not all(file_is(folder, state) for state in state_files(entries[-1])):
        entries.pop()
    return entries


def said(key: str, started: dict[str, Any]) -> str:
    """A key of an identity, with its value where that is a number."""
    return f"{key} ({started[key]})" if isinstance(started.get(key), int) else key


def state_files(entry: dict[str, Any]) -> list[Any]:
    """The states behind a finished part: one for each process."""
    return [entry.get("state"), *entry.get("other_states", [])]


def written_files(entry: dict[str, Any]) -> list[Any]:
    """What a finished part has put into the folder: its tensors, and its share of an adapter where there is one."""
    return [entry.get("part"), *([entry["adapter"]] if entry.get("adapter") else [])]


def file_is(folder: Path, written: Any) -> bool:
    if not isinstance(written, dict) or not is_own_name(written.get("file")):
        return False
    file = folder / written["file"]
    return file.is_file() and sha256(file) == written.get("sha256")


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A safetensors file that is there whole or not at all; its name, bytes and sha256.

    Raises OutputError when the disk is full or may not be written.
    """
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    try:
        with whole(file) as unfinished:
            save_file(tensors, unfinished, metadata={"format": "pt"})
            unfinished.chmod(new_file_mode())  # safetensors makes files that only their owner may read
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{file} cannot be written ({error}). Free space or choose another --out; --resume goes on from here."
        ) from error
    return {"file": file.name, "bytes": file.stat().st_size, "sha256": sha256(file)}


def new_file_mode() -> int:
    """What the user's umask gives a new file."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_line(file: IO[str], entry: dict[str, Any]) -> None:
    file.write(json.dumps(entry, sort_keys=True) + "\n")
    file.flush()
    os.fsync(file.fileno())


def rewritten(file: Path, lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A journal of these lines alone, whole or as it was; the lines with their seals."""
    seal, sealed = "", []
    with whole(file) as unfinished, unfinished.open("w", encoding="utf-8") as opened:
        for line in lines:
            seal = seal_of(line, seal)
            sealed.append(line | {SEAL: seal})
            write_line(opened, sealed[-1])
    return sealed


def seal_of(line: dict[str, Any], before: str) -> str:
    """A hash over a line and, by the seal of the line before it, all that came before."""
    bare = json.loads(json.dumps({key: value for key, value in line.items() if key != SEAL}))  # as it will be read
    return hashlib.sha256((before + json.dumps(bare, sort_keys=True)).encode()).hexdigest()


def named_files(told: Any) -> set[str]:
    """The names of all files that a line, or anything in it, speaks of with their hash."""
    if isinstance(told, dict):
        mine = {told["file"]} if isinstance(told.get("file"), str) and "sha256" in told else set()
        return mine.union(*map(named_files, told.values()))
    return set().union(*map(named_files, told)) if isinstance(told, list) else set()


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The journal's lines up to the first that is not whole, or not as or where it was written."""
    lines: list[dict[str, Any]] = []
    seal = ""
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []:
        try:
            line = parse_json(text)
        except ValueError:
            break
        if not is_line(line) or line.get(SEAL) != seal_of(line, seal):
            break
        seal = line[SEAL]
        lines.append(line)
    return lines


def is_line(line: Any) -> bool:
    """Whether it says what a run is, a finding or a finished part."""
    if not isinstance(line, dict):
        return False
    is_finding = isinstance(line.get("finding"), str) and isinstance(line.get("files"), list)
    return is_finding or isinstance(line.get("run"), dict) or isinstance(line.get("part"), dict)


def clear(folder: Path, kept: Collection[str]) -> None:
    """Delete what lies in a folder, but what bears one of these names."""
    for left in folder.iterdir():
        if left.name in kept:
            continue
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()


@contextmanager
def holding(folder: Path, given: IO[str] | None) -> Iterator[IO[str]]:
    """The lock that was given, or else one that is taken, and let go of if the block fails."""
    lock = given or take_lock(folder)
    try:
        yield lock
    except BaseException:
        if lock is not given:
            lock.close()
        raise


def take_lock(folder: Path) -> IO[str]:
    lock = (folder / LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise UsageError(f"Another run is writing {folder}. Wait for it, or choose another --out.") from error
    return lock
