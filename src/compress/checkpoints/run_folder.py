"""The folder of a run in progress, which a killed run resumes from.

    OUT.partial/lock            held by the process that writes
    OUT.partial/run.json        what the run is, what it has finished, the sha256 of every file that counts
    OUT.partial/checkpoint/     the files of the output to come
    OUT.partial/...             the state after the last finished part, findings, scratch files

run.json is replaced atomically, after the files it lists have reached the disk: what it does not list has not happened.

Several processes share the folder; all must see it. The first one holds the lock and writes run.json. Each has a state
of its own, and a part counts when the states after it have reached the disk in every process.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file
from torch import Tensor

from compress.calibration.processes import ALONE, Processes
from compress.checkpoints.integrity import check_integrity
from compress.checkpoints.metadata import METADATA, Metadata, read_metadata
from compress.checkpoints.output_folder import LOCK, Output, locked, publish
from compress.errors import CheckpointError, UsageError
from compress.io import WrittenFile, atomic_write, fsync_tree, sha256, write_tensors
from compress.models.tensor_files import is_own_name
from compress.models.untrusted import parse_json
from compress.progress import Progress, silent

RUN, CHECKPOINT = "run.json", "checkpoint"
logger = logging.getLogger("compress")


class Part(BaseModel):
    """A finished part. weights: its file. adapter: a file that is joined with others at the end. report: plain data."""

    model_config = ConfigDict(strict=True)
    weights: WrittenFile | None = None
    adapter: WrittenFile | None = None
    report: dict[str, Any] = {}


class Finding(BaseModel):
    """Something found before the first part: plain data, and files in OUT.partial."""

    model_config = ConfigDict(strict=True)
    data: Any
    files: list[WrittenFile] = []


class Run(BaseModel):
    """The content of run.json.

    identity: all that the bytes of the output depend on. states: after the last part, a file a process.
    finished: the checkpoint is complete and only lacks its name.
    """

    model_config = ConfigDict(strict=True)
    identity: dict[str, Any]
    findings: dict[str, Finding] = {}
    parts: list[Part] = []
    states: list[WrittenFile] = []
    finished: bool = False

    @property
    def is_empty(self) -> bool:
        return not self.parts and not self.findings

    @property
    def weights(self) -> list[WrittenFile]:
        return [part.weights for part in self.parts if part.weights]

    @property
    def scratch(self) -> list[WrittenFile]:
        """The files that count, those of the checkpoint left out."""
        found = [file for finding in self.findings.values() for file in finding.files]
        return [*found, *(part.adapter for part in self.parts if part.adapter), *self.states]


class RunFolder:
    """The folder of a run in progress. `open_run` makes it."""

    def __init__(self, job: Output, run: Run, processes: Processes = ALONE) -> None:
        self.out, self.partial = job.out, job.partial
        self.checkpoint = self.partial / CHECKPOINT
        self.run, self.parts, self.findings = run, run.parts, run.findings
        self.processes = processes

    def note(
        self, name: str, data: Any, tensors: Mapping[str, Tensor] | None = None, files: Sequence[WrittenFile] = ()
    ) -> None:
        """Record a finding. files: those that are written already."""
        found = None
        if self.processes.is_first:
            own = [write_tensors(self.partial / f"finding-{name}.safetensors", tensors)] if tensors else []
            self.findings[name] = Finding(data=data, files=[*own, *files])
            self._save()
            found = self.findings[name].model_dump()
        self.findings[name] = Finding.model_validate(self.processes.from_first(found))

    def found_tensors(self, name: str) -> dict[str, Tensor]:
        tensors = load_file(self.partial / self.findings[name].files[0].file)
        # Copies: tensors of a file lie unaligned, and products of matrices round differently there.
        return {key: tensor.clone() for key, tensor in tensors.items()}

    def record(self, part: Part, state: Mapping[str, Tensor]) -> None:
        """Record a finished part and the state after it. The state before it is deleted."""
        file = self.partial / f"state-{len(self.parts):05d}-{self.processes.rank}.safetensors"
        states = self.processes.gathered(write_tensors(file, state).model_dump())
        passed, self.run.states = self.run.states, [WrittenFile.model_validate(each) for each in states]
        self.parts.append(part)
        if self.processes.is_first:
            self._save()
            for old in passed:
                (self.partial / old.file).unlink(missing_ok=True)

    @property
    def state_file(self) -> Path:
        """The state that this process resumes from."""
        return self.partial / self.run.states[self.processes.rank].file

    def state(self) -> dict[str, Tensor]:
        return load_file(self.state_file)

    def finish(self) -> None:
        """Record that the checkpoint is complete and verified, then publish it."""
        fsync_tree(self.checkpoint)
        self.run.finished = True
        self._save()
        self.publish()

    def publish(self) -> None:
        """Rename the finished checkpoint to OUT and delete the folder."""
        publish(self.checkpoint, self.out, self.partial)
        # What remains when this is interrupted is still the folder of a run, so the next one can use or delete it.
        clear(self.partial, kept={LOCK, RUN})
        shutil.rmtree(self.partial)

    def keep_intact(self, progress: Progress) -> None:
        """Forget what has files that are missing or changed; delete the files that are not listed."""
        run = self.run
        if run.finished:
            with suppress(CheckpointError):
                check_integrity(self.checkpoint, read_metadata(self.checkpoint), checksums=True, progress=progress)
                return
        run.finished = False
        places = [(self.checkpoint, file) for file in run.weights] + [(self.partial, file) for file in run.scratch]
        # Parts depend on all findings, and only the last state is there to resume from.
        if not all(is_intact(folder, file) for folder, file in places):
            run.parts.clear()
            run.states.clear()
        for name, found in list(run.findings.items()):
            if not all(is_intact(self.partial, file) for file in found.files):
                del run.findings[name]
        self._save()
        self.checkpoint.mkdir(exist_ok=True)
        clear(self.checkpoint, kept={file.file for file in run.weights})
        clear(self.partial, kept={LOCK, RUN, CHECKPOINT, *(file.file for file in run.scratch)})

    def _save(self) -> None:
        data = self.run.model_dump()
        with atomic_write(self.partial / RUN) as unfinished:
            unfinished.write_text(json.dumps({"run": data, "checksum": checksum(data)}) + "\n", encoding="utf-8")


@contextmanager
def open_run(
    job: Output, identity: Mapping[str, Any], processes: Processes = ALONE, progress: Progress = silent
) -> Iterator[RunFolder]:
    """Lock the folder of a run and start the run, or resume the one of the same identity that was left there.

    identity: all that the bytes of the output depend on, as plain data.

    With `folder.run.finished` only `publish` is left to be done. A run that ends before it has recorded anything
    leaves nothing behind.
    Raises UsageError for the folder of another run or one in use, and for an output that may not be replaced;
    OutputError when the disk is full or may not be written.
    """
    if not processes.is_first:
        yield RunFolder(job, Run.model_validate(processes.from_first(None)), processes)
        return
    left = read_run(job.partial) if job.resume else None
    with locked(job, will_publish=left is not None and left.finished):
        run = resumed(job.partial, identity) if job.resume else None
        folder = RunFolder(job, run or Run(identity=dict(identity)), processes)
        try:
            folder.keep_intact(progress)
            processes.from_first(folder.run.model_dump())
            yield folder
        finally:
            if folder.run.is_empty and job.partial.exists():
                clear(job.partial, kept={LOCK})


def resumed(partial: Path, identity: Mapping[str, Any]) -> Run | None:
    """The run that was left in a folder; None where there is none. Raises UsageError for another identity."""
    if all(file.name == LOCK for file in partial.iterdir()):
        logger.warning("--resume: there is no unfinished run in %s. Starting from the beginning.", partial)
        return None
    run = read_run(partial)
    if run is None:
        raise UsageError(f"{partial} has no readable {RUN}. Start over with --overwrite.")
    mine, theirs = json.loads(json.dumps(dict(identity))), run.identity
    differing = {key: theirs.get(key) for key in sorted(mine.keys() | theirs) if mine.get(key) != theirs.get(key)}
    if differing:
        named = (f"{key} ({value})" if isinstance(value, int) else key for key, value in differing.items())
        raise UsageError(
            f"--resume: the run in {partial} had another {', '.join(named)}. "
            "Give the same options, or start over with --overwrite."
        )
    return run


def read_run(partial: Path) -> Run | None:
    """None where run.json is missing or damaged."""
    try:
        found = parse_json((partial / RUN).read_text(encoding="utf-8"))
        return Run.model_validate(found["run"]) if found["checksum"] == checksum(found["run"]) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def checksum(data: Any) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def is_intact(folder: Path, written: WrittenFile) -> bool:
    file = folder / written.file
    return is_own_name(written.file) and file.is_file() and sha256(file) == written.sha256


def clear(folder: Path, kept: Collection[str]) -> None:
    """Delete what lies in a folder, except for these names."""
    for left in folder.iterdir():
        if left.name in kept:
            continue
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()


def check_folder(folder: Path) -> None:
    """Raises UsageError where a folder holds no model, or one that is not finished, with what would finish it."""
    partial = folder if folder.suffix == ".partial" else folder.with_name(f"{folder.name}.partial")
    if partial.is_dir() and (partial == folder or not folder.exists()):
        raise UsageError(unfinished(partial))
    if folder.is_file():
        raise UsageError(f"{folder} is a file. Name the folder of a checkpoint.")
    if not folder.is_dir():
        raise UsageError(f"There is no folder {str(folder)!r}. Check the path.")
    if not (folder / "config.json").exists() and not (folder / METADATA).exists():
        raise UsageError(
            f"{folder} is no checkpoint: it has neither config.json nor {METADATA}. Name a model's folder."
        )


def own_metadata(folder: Path, verb: str) -> Metadata:
    """The metadata of a finished checkpoint. Raises UsageError for one of another program: only ours are VERBed."""
    check_folder(folder)
    if not (folder / METADATA).exists():
        raise UsageError(f"{folder} has no {METADATA}. Only checkpoints that compress has made are {verb}.")
    metadata = read_metadata(folder)
    if verb == "tuned" and metadata.form == "gguf":
        raise UsageError(
            f"{folder} is one GGUF file, whose weights are not {verb}. Tune the model before it is quantized."
        )
    return metadata


def unfinished(partial: Path) -> str:
    """What a run has left, and how it is resumed."""
    out, run = partial.with_suffix(""), read_run(partial)
    if run is not None and run.finished:
        return f"{partial} is finished but for its name: the command that made it, with --resume, calls it {out.name}."
    files = [] if run is None else [file.file for file in run.weights]
    total = files[-1].rpartition("-of-")[2].removesuffix(".safetensors").lstrip("0") if files else ""
    done = f"{len(files)} of {total} parts are written" if total.isdigit() else "no part is written yet"
    return (
        f"{partial} is an unfinished run: {done}. The same command with --resume goes on from there and makes {out}; "
        "with --overwrite it starts over."
    )
