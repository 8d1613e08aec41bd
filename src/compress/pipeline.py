"""From a model and a recipe to a checkpoint: everything checked first, one walk, every part written as it is finished.

The output is built in `<out>.partial` and gets its name by a rename, after it has been reloaded in a clean process.
Nothing volatile (times, paths of this machine) goes into it: the same inputs give the same bytes.
"""

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from torch import Tensor

from compress import families
from compress.checkpoints import files
from compress.checkpoints.card import model_card
from compress.checkpoints.sliced import CARRIED, Size, sliced_config
from compress.checkpoints.verify import verify
from compress.datasets.windows import calibration_windows, fingerprint
from compress.errors import CompressError, OutputError, UsageError
from compress.models.decoder import Decoder
from compress.models.hub import ModelSource
from compress.models.loading import load_config, load_tokenizer
from compress.numerics.precision import full_precision
from compress.plan import Plan, make_plan
from compress.recipe import Recipe
from compress.streaming.journal import Journal, write_tensors
from compress.streaming.walk import FinishedPart, Walk, WalkSettings
from compress.streaming.weights import LazyWeights
from compress.version import __version__

PROBE_TOKENS = 64
TOKENS_PER_BATCH = 8192
SMALL = 5 * 10**8  # bytes: a model below this is reloaded whole, whatever the walk needed


@dataclass(frozen=True, kw_only=True)
class Job:
    """
    command: how a user would ask for it again; it goes into the model card.
    batch_size: windows at a time; None for about 8192 tokens.
    cache_memory: bytes of activations to hold in memory; None for half of what is free.
    """

    model: ModelSource
    recipe: Recipe
    out: Path
    command: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int | None = None
    cache_memory: int | None = None
    data_dir: Path | None = None
    resume: bool = False
    overwrite: bool = False

    @property
    def partial(self) -> Path:
        return self.out.with_name(f"{self.out.name}.partial")


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
    difference: float
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


@dataclass
class Prepared:
    """A job whose every input has been looked at."""

    job: Job
    config: Any
    family: families.Family
    dtype: torch.dtype
    computing: torch.dtype
    cache_memory: int
    plan: Plan
    folder: Path
    weights: LazyWeights
    windows: Tensor


Progress = Callable[[str, int, int], None]


def plan_only(job: Job) -> Plan:
    """The plan, from config.json alone: the weights need not be on this machine."""
    config = load_config(job.model.config_folder())
    return _planned(job, config)[0]


def run(job: Job, progress: Progress = lambda name, done, total: None) -> Result:
    """Compress. `progress` hears each finished part's name, its number and how many there are.

    Raises a CompressError for what a user can mend; until the first part is written, nothing is left behind.
    """
    with full_precision():
        start = time.perf_counter()
        prepared = prepare(job)
        walk = _new_walk(prepared)
        with _journal(prepared) as journal:
            resumed = len(journal.entries)
            if resumed:
                walk.restore(journal.state(), resumed)
            for part in walk.parts():
                _write_part(journal, part, walk)
                progress(part.name, part.index + 1, walk.num_parts)
            progress("reloading", walk.num_parts, walk.num_parts)
            return _complete(prepared, walk, journal, start, resumed)


def prepare(job: Job) -> Prepared:
    """Look at everything before the first weight is read, and report all faults at once."""
    folder = job.model.whole_folder()
    config = load_config(folder)
    plan, family, dtype, computing, cache_memory = _planned(job, config)
    calibration, found = job.recipe.calibration, {}

    def look(name: str, action: Callable[[], Any]) -> None:
        found[name] = action()

    def windows() -> Tensor:
        return calibration_windows(
            calibration.source,
            load_tokenizer(folder),
            num_samples=calibration.samples,
            seq_len=calibration.seq_len,
            seed=job.recipe.seed,
            data_dir=job.data_dir,
        )

    faults: list[CompressError] = []
    checks: dict[str, Callable[[], Any]] = {
        "output": lambda: check_output(job),
        "positions": lambda: check_positions(config, calibration.seq_len),
        "disk": lambda: check_disk(job.out, plan.disk_bytes),
        "memory": lambda: check_memory(plan.memory_bytes),
        "weights": lambda: open_weights(folder, config, family),
        "windows": windows,
    }
    for name, action in checks.items():
        try:
            look(name, action)
        except CompressError as fault:
            faults.append(fault)
    if faults:
        raise type(faults[0])("\n".join(str(fault) for fault in faults))
    return Prepared(
        job, config, family, dtype, computing, cache_memory, plan, folder, found["weights"], found["windows"]
    )


def check_output(job: Job) -> None:
    if job.out.exists() and not job.overwrite:
        raise UsageError(f"The output {job.out} exists. Choose another --out, or replace it with --overwrite.")
    if job.partial.exists() and not (job.resume or job.overwrite):
        raise UsageError(f"An unfinished run is in {job.partial}. Go on with --resume, or start over with --overwrite.")
    if job.resume and not job.partial.exists():
        raise UsageError(f"--resume: there is no unfinished run in {job.partial}. Run it without --resume.")


def check_positions(config: Any, seq_len: int) -> None:
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and seq_len > positions:
        raise UsageError(
            f"--seq-len {seq_len} is more than the model's {positions} positions. Use --seq-len {positions}."
        )


def check_disk(out: Path, needed: int) -> None:
    parent = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(f"The run needs {needed / 1e9:.1f} GB of disk, {parent} has {free / 1e9:.1f} GB. Free some.")


def check_memory(needed: int) -> None:
    total = psutil.virtual_memory().total
    if total < needed:
        raise UsageError(
            f"The run needs {needed / 1e9:.1f} GB of memory, this machine has {total / 1e9:.1f} GB. "
            "Use fewer --samples, a shorter --seq-len or a smaller --cache-memory."
        )


def open_weights(folder: Path, config: Any, family: families.Family) -> LazyWeights:
    weights = LazyWeights(folder)
    shapes = Decoder(config, family, dtype=torch.float32, device=torch.device("cpu")).parameter_shapes()
    tied = [f"{family.head}.weight"] if config.tie_word_embeddings else []
    weights.check_against(shapes, may_miss=tied)
    return weights


def _planned(job: Job, config: Any) -> tuple[Plan, families.Family, torch.dtype, torch.dtype, int]:
    family = families.find(config)
    dtype = getattr(torch, job.recipe.dtype) if job.recipe.dtype else config.dtype or torch.float32
    computing = torch.float64 if dtype == torch.float64 else torch.float32
    cache_memory = psutil.virtual_memory().available // 2 if job.cache_memory is None else job.cache_memory
    plan = make_plan(job.recipe, config, family, dtype=dtype, computing=computing, cache_memory=cache_memory)
    return plan, family, dtype, computing, cache_memory


def _new_walk(prepared: Prepared) -> Walk:
    job, windows = prepared.job, prepared.windows
    prepared.job.partial.parent.mkdir(parents=True, exist_ok=True)
    return Walk(
        Decoder(prepared.config, prepared.family, dtype=prepared.computing, device=job.device),
        prepared.weights,
        windows,
        windows[:1, :PROBE_TOKENS],
        job.recipe.stages,
        WalkSettings(
            output_dtype=prepared.dtype,
            batch_size=job.batch_size or max(1, TOKENS_PER_BATCH // windows.shape[1]),
            seed=job.recipe.seed,
            cache_memory=prepared.cache_memory,
            scratch=job.partial.parent,
        ),
    )


@contextmanager
def _journal(prepared: Prepared) -> Iterator[Journal]:
    """The journal of this run; a run that ends before its first part leaves no folder behind."""
    job = prepared.job
    if job.resume:
        journal = Journal.resume(job.partial, identity(prepared))
    else:
        if job.partial.exists():
            shutil.rmtree(job.partial)
        journal = Journal.start(job.partial, identity(prepared))
    try:
        yield journal
    finally:
        journal.close()
        if not journal.entries and job.partial.exists():
            shutil.rmtree(job.partial)


def identity(prepared: Prepared) -> dict[str, Any]:
    """What determines the output's bytes."""
    job = prepared.job
    return {
        "recipe": job.recipe.model_dump(mode="json"),
        "model": input_fingerprint(prepared.folder, prepared.weights),
        "calibration text": fingerprint(prepared.windows),
        "versions": versions(),
        "device": job.device.type,
        "batch size": job.batch_size,
        "dtype": str(prepared.dtype).removeprefix("torch."),
    }


def versions() -> dict[str, str]:
    return {
        "compress": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def input_fingerprint(folder: Path, weights: LazyWeights) -> str:
    """sha256 over config.json and the names, shapes and types of all tensors with the sizes of their files."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for name in sorted(weights.files):
        file = weights.files[name]
        digest.update(f"{name} {list(weights.shapes[name])} {weights.dtypes[name]} {file.stat().st_size}\n".encode())
    return digest.hexdigest()


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
    points = [point for entry in journal.entries for point in entry["points"]]
    widths = [point["width"] for point in points]
    size = Size(*(sum(entry[key] for entry in journal.entries) for key in ("parameters", "tensor_bytes")))
    config = sliced_config(prepared.config, prepared.family, widths, prepared.dtype)
    files.write_json(partial / "config.json", config.to_diff_dict())
    files.carry_modeling(partial, CARRIED)
    files.copy_companions(prepared.folder, partial)
    files.write_index(partial, journal.entries)
    facts = {
        "name": f"{job.model.name}-{job.recipe.method}",
        "base_model": job.model.repository or job.model.name,
        "command": job.command,
        "recipe": job.recipe.model_dump(mode="json"),
        "versions": versions(),
        "fingerprints": {key: identity(prepared)[key] for key in ("model", "calibration text")},
        "itemsize": prepared.dtype.itemsize,
        "dense_size": vars(prepared.plan.dense),
        "size": vars(size),
        "points": points,
        "parts": {entry["part"]["file"]: entry["part"]["sha256"] for entry in journal.entries},
    }
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


def publish(partial: Path, out: Path) -> None:
    """Give the finished folder its name. An output to be replaced is moved aside first and deleted last."""
    aside = out.with_name(f"{out.name}.replaced")
    if aside.exists():
        shutil.rmtree(aside)
    if out.exists():
        out.rename(aside)
    partial.rename(out)
    if aside.exists():
        shutil.rmtree(aside)


def recipe_of(folder: Path) -> dict[str, Any]:
    """What compress.json of a compressed checkpoint says."""
    facts: dict[str, Any] = json.loads((folder / "compress.json").read_text(encoding="utf-8"))
    return facts
