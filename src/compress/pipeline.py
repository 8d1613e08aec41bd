"""From a model and a recipe to a checkpoint: everything checked first, one walk, every part written as it is finished.

The output is built in `<out>.partial` and gets its name by a rename, after it has been reloaded in a clean process.
Nothing volatile (times, paths of this machine) goes into it: the same inputs give the same bytes.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.checkpoints import files
from compress.checkpoints.card import model_card
from compress.checkpoints.sliced import CARRIED, Size, sliced_config
from compress.checkpoints.verify import verify
from compress.errors import OutputError
from compress.job import Job
from compress.models.decoder import Decoder
from compress.models.loading import load_config
from compress.numerics.precision import full_precision
from compress.plan import Plan
from compress.preflight import Prepared, aside_of, cache_memory, plan_job, prepare
from compress.provenance import identity
from compress.streaming.journal import JOURNAL, Journal, write_tensors
from compress.streaming.walk import FinishedPart, Walk, WalkSettings

PROBE_TOKENS = 64
TOKENS_PER_BATCH = 8192
SMALL = 5 * 10**8  # bytes: a model below this is reloaded whole, whatever the walk needed


@dataclass(frozen=True)
class Result:
    """
    seconds: by kind of work; `total` is the whole run's, imports left out.
    difference: of the reloaded logits, as a share of the largest.
    """

    out: Path
    dense: Size
    size: Size
    widths: list[int]
    seconds: dict[str, float]
    difference: float | None
    resumed_parts: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "dense_parameters": self.dense.parameters,
            "parameters": self.size.parameters,
            "removed": 1 - self.size.parameters / self.dense.parameters,
            "dense_bytes": self.dense.bytes,
            "bytes": self.size.bytes,
            "widths": self.widths,
            "seconds": {kind: round(value, 3) for kind, value in self.seconds.items()},
            "reload_difference": self.difference,
            "resumed_parts": self.resumed_parts,
        }


Progress = Callable[[str, int, int], None]


def plan_only(job: Job) -> Plan:
    """The plan, from config.json alone: the weights need not be on this machine."""
    folder = job.model.config_folder()
    return plan_job(job, folder, load_config(folder))


def run(job: Job, progress: Progress = lambda name, done, total: None) -> Result:
    """Compress. `progress` hears each finished part's name, its number and how many there are.

    Raises a CompressError for what a user can mend; until the first part is written, nothing is left behind.
    """
    with full_precision():
        start = time.perf_counter()
        prepared = prepare(job)
        if job.resume and (finished := _give_name(prepared)):
            return finished
        with _parent_folder(job), _journal(prepared) as journal:
            walk = _new_walk(prepared)
            resumed = len(journal.entries)
            if resumed:
                walk.restore(journal.state(), resumed)
            for part in walk.parts():
                _write_part(journal, part, walk)
                progress(part.name, part.index + 1, walk.num_parts)
            progress("reloading", walk.num_parts, walk.num_parts)
            return _complete(prepared, walk, journal, start, resumed)


def _new_walk(prepared: Prepared) -> Walk:
    job, windows = prepared.job, prepared.windows
    return Walk(
        Decoder(prepared.config, prepared.family, dtype=prepared.precision.computing, device=job.device),
        prepared.weights,
        windows,
        windows[:1, :PROBE_TOKENS],
        job.recipe.stages,
        WalkSettings(
            output_dtype=prepared.precision.written,
            batch_size=job.batch_size or max(1, TOKENS_PER_BATCH // windows.shape[1]),
            seed=job.recipe.seed,
            cache_memory=cache_memory(job),
            scratch=job.partial.parent,
        ),
    )


@contextmanager
def _parent_folder(job: Job) -> Iterator[None]:
    """The folder that the output lies in. What had to be made for it goes again if nothing is kept there."""
    made = [folder for folder in job.partial.absolute().parents if not folder.exists()]
    try:
        job.partial.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{job.partial.parent} cannot be made ({error}). Choose another --out.") from error
    try:
        yield
    finally:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


@contextmanager
def _journal(prepared: Prepared) -> Iterator[Journal]:
    """The journal of this run; a run that ends before its first part leaves no folder behind."""
    job = prepared.job
    journal = None
    try:
        if job.resume:
            journal = Journal.resume(job.partial, identity(prepared))
        else:
            journal = Journal.start(job.partial, identity(prepared))
        yield journal
    except OSError as error:
        raise OutputError(
            f"{job.partial} cannot be written ({error}). Free space or choose another --out; "
            "what was finished is kept for --resume."
        ) from error
    finally:
        if journal is not None:
            journal.close()
            if not journal.entries and job.partial.exists():
                shutil.rmtree(job.partial)


def _give_name(prepared: Prepared) -> Result | None:
    """The end of a run that was killed when it was finished and verified, and only lacked its name."""
    job = prepared.job
    facts_file = job.partial / "compress.json"
    if (job.partial / JOURNAL).exists() or not facts_file.is_file():
        return None
    facts = json.loads(facts_file.read_text(encoding="utf-8"))
    mine = identity(prepared)
    same = facts["recipe"] == mine["recipe"] and facts["versions"] == mine["versions"]
    if not same or any(facts["fingerprints"][name] != mine[name] for name in facts["fingerprints"]):
        return None
    publish(job.partial, job.out)
    widths = [point["width"] for point in facts["points"]]
    size = Size(**facts["size"])
    return Result(job.out, prepared.plan.dense, size, widths, {"total": 0.0}, None, len(facts["parts"]))


def _write_part(journal: Journal, part: FinishedPart, walk: Walk) -> None:
    with walk.clock("write"):
        written = write_tensors(journal.folder / files.part_file(part.index, walk.num_parts), part.tensors)
        entry = {
            "name": part.name,
            "part": written,
            "tensors": sorted(part.tensors),
            "tensor_bytes": sum(tensor.nbytes for tensor in part.tensors.values()),
            "parameters": sum(tensor.numel() for tensor in part.tensors.values()),
            "points": part.points,
        }
        journal.record(entry, walk.state())


def _complete(prepared: Prepared, walk: Walk, journal: Journal, start: float, resumed: int) -> Result:
    """The rest of the checkpoint, the proof that it reloads, and its name."""
    job, partial = prepared.job, journal.folder
    facts = _facts(prepared, journal)
    size, widths = Size(**facts["size"]), [point["width"] for point in facts["points"]]
    config = sliced_config(prepared.config, prepared.family, widths, prepared.precision.written)
    files.write_json(partial / "config.json", config.to_diff_dict())
    files.carry_modeling(partial, CARRIED)
    files.copy_companions(prepared.folder, partial)
    files.write_index(partial, journal.entries)
    files.write_json(partial / "compress.json", facts)
    (partial / "README.md").write_text(model_card(facts), encoding="utf-8")
    with walk.clock("verify"):
        ids, logits = walk.probe_ids, walk.probe
        assert logits is not None
        difference = verify(partial, ids, logits, memory=max(prepared.plan.memory_bytes, SMALL))
    journal.forget()
    publish(partial, job.out)
    seconds = dict(walk.clock.seconds) | {"total": time.perf_counter() - start}
    return Result(job.out, prepared.plan.dense, size, widths, seconds, difference, resumed)


def _facts(prepared: Prepared, journal: Journal) -> dict[str, Any]:
    """What compress.json says: how the checkpoint came about and what is in it."""
    job, entries = prepared.job, journal.entries
    run = identity(prepared)
    return {
        "name": f"{job.model.name}-{job.recipe.method}",
        "base_model": job.model.repository or job.model.name,
        "command": job.command,
        "recipe": run["recipe"],
        "versions": run["versions"],
        "fingerprints": {key: run[key] for key in ("model", "calibration text")},
        "itemsize": prepared.precision.written.itemsize,
        "dense_size": vars(prepared.plan.dense),
        "size": {
            "parameters": sum(entry["parameters"] for entry in entries),
            "bytes": sum(entry["tensor_bytes"] for entry in entries),
        },
        "points": [point for entry in entries for point in entry["points"]],
        "parts": {entry["part"]["file"]: entry["part"]["sha256"] for entry in entries},
    }


def publish(partial: Path, out: Path) -> None:
    """Give the finished folder its name. An output to be replaced is moved aside first and deleted last."""
    aside = aside_of(out)
    if out.exists():
        if aside.exists():
            shutil.rmtree(aside)
        out.rename(aside)
    partial.rename(out)
    if aside.is_symlink():
        aside.unlink()
    elif aside.exists():
        shutil.rmtree(aside)
