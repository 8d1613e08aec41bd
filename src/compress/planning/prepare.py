"""Check a job before its first weight is read; report all problems at once."""

import shutil
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from compress import families
from compress.calibration.processes import ALONE, Processes
from compress.calibration.weights import READABLE, LazyWeights
from compress.checkpoints.files import companions
from compress.checkpoints.output_folder import Output, check_output
from compress.datasets.windows import calibration_windows
from compress.errors import CheckpointError, OutputError, Problems, UnsupportedModel, UsageError
from compress.models.decoder import Decoder
from compress.models.loading import check_positions, check_vocabulary, load_config, load_tokenizer
from compress.models.tensor_files import ADAPTER, SafetensorsFolder
from compress.planning.memory import (
    Room,
    fit_to_limit,
    largest_part_bytes,
    needs,
    resident_bytes,
    usual_batch_size,
)
from compress.planning.plan import Plan, make_plan
from compress.recipe import Recipe

# Bytes that the interpreter holds more in the midst of a run than before it: libraries that are imported on the way,
# and small pieces of freed memory, which are not given back.
GROWTH = 64 * 10**6


@dataclass(frozen=True, kw_only=True)
class Job(Output):
    """
    command: how a user would ask for it again; it goes into the model card.
    export: `hf` for the checkpoint folder alone, `gguf` for a GGUF file in it as well.
    batch_size: windows at a time; None for about 8192 tokens.
    cache_memory: bytes of activations to hold in memory; None for half of what is free.
    max_memory: bytes that the run may hold at once, the process that reloads the result included; None for no limit.
    """

    recipe: Recipe
    command: str
    export: Literal["hf", "gguf"] = "hf"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int | None = None
    cache_memory: int | None = None
    max_memory: int | None = None
    data_dir: Path | None = None


@dataclass(frozen=True)
class Precision:
    """The dtype weights are written in, and the one the walk computes in."""

    written: torch.dtype
    computing: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A job whose inputs have all been checked.

    processes: those that do it together. held: bytes that this one held before.
    """

    job: Job
    folder: Path
    config: Any
    family: families.Family
    precision: Precision
    plan: Plan
    weights: LazyWeights
    windows: Tensor
    held: int
    processes: Processes = ALONE


def prepare(job: Job, processes: Processes = ALONE) -> Prepared:
    """Check everything. Raises a CompressError with a line for every problem and the exit code of the first."""
    folder = job.model.whole_folder()
    config = load_config(folder)
    calibration, problems, before = job.recipe.calibration, Problems(), resident_bytes()
    with problems.collect():
        family, plan = families.find(config), plan_job(job, folder, config, processes)
    planned = not problems.found
    with problems.collect():
        check_output(job)
    with problems.collect():
        check_batches(job, processes.count)
    with problems.collect():
        check_positions(config, calibration.seq_len)
    if planned:
        writes_gguf = job.export == "gguf" or plan.spec.is_gguf
        with problems.collect():
            check_disk(job.out, plan.disk_bytes + (plan.spec.size.bytes if writes_gguf else 0))
        with problems.collect():
            check_memory(plan.memory_bytes * processes.local_count)
        with problems.collect():
            weights = open_weights(folder, config, family)
        with problems.collect():
            companions(folder)
        if writes_gguf:
            with problems.collect():
                check_gguf(plan, folder)
    with problems.collect():
        windows = read_windows(job, folder)
        check_vocabulary(windows, config, folder)
    problems.report()
    return Prepared(
        job=job,
        folder=folder,
        config=config,
        family=family,
        precision=choose_precision(job, folder, config),
        plan=plan,
        weights=weights,
        windows=windows,
        held=before,
        processes=processes,
    )


def read_windows(job: Job, folder: Path) -> Tensor:
    calibration = job.recipe.calibration
    return calibration_windows(
        calibration.source,
        load_tokenizer(folder),
        num_samples=calibration.samples,
        seq_len=calibration.seq_len,
        seed=job.recipe.seed,
        data_dir=job.data_dir,
    )


def choose_precision(job: Job, folder: Path, config: Any) -> Precision:
    """float32 for the walk, whatever the weights are stored in; float64 for float64 models."""
    if job.recipe.dtype:
        written = getattr(torch, job.recipe.dtype)
    else:
        written = config.dtype or stored_dtype(folder) or torch.float32
    return Precision(written, torch.float64 if written == torch.float64 else torch.float32)


def plan_job(job: Job, folder: Path, config: Any, processes: Processes = ALONE) -> Plan:
    """Plan a job. Raises where the recipe does not fit the model, or the run does not fit the memory."""
    check_dense(folder, config)
    precision, family = choose_precision(job, folder, config), families.find(config)
    room = Room(job.batch_size or usual_batch_size(job.recipe), cache_memory(job, processes))
    make = partial(make_plan, job.recipe, config, family, dtype=precision.written, computing=precision.computing)
    plan = make(room=room)
    if job.max_memory is None:
        return plan
    before, part = resident_bytes(), largest_part_bytes(config, family, precision.computing)
    # The process that reloads the result takes it part by part, unless its form cannot stay on disk.
    whole = bool(plan.spec.packed) or job.export == "gguf"
    proof = 2 * plan.dense.bytes if whole else 2 * part

    def need(room: Room) -> int:
        run, _ = needs(job.recipe, plan.stages, config, family, computing=precision.computing, room=room)
        return max(run, before + proof)

    room = fit_to_limit(room, job.max_memory, before + GROWTH, need, fixed_batch=job.batch_size is not None)
    plan = make(room=room)
    return replace(plan, notes=[*plan.notes, room_note(room, job.max_memory)])


def room_note(room: Room, limit: int) -> str:
    return (
        f"Within {limit / 1e9:.1f} GB: {room.batch_size} windows at a time, activations beyond "
        f"{room.cache_memory / 1e9:.1f} GB on disk."
    )


def check_dense(folder: Path, config: Any) -> None:
    """Raise UnsupportedModel for a model that is quantized or has an adapter."""
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel(f"{folder} is quantized already. Compress the dense model instead.")
    if (folder / ADAPTER).is_dir():
        raise UnsupportedModel(f"{folder} has an adapter, which would be lost. Compress the dense model instead.")


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype of most tensors of a checkpoint, where config.json does not say; None without weights."""
    try:
        stored = Counter(tensor.dtype for tensor in SafetensorsFolder(folder).tensors.values())
    except CheckpointError:
        return None
    return READABLE.get(stored.most_common(1)[0][0])


def cache_memory(job: Job, processes: Processes) -> int:
    if job.cache_memory is not None:
        return job.cache_memory
    return psutil.virtual_memory().available // 2 // processes.local_count


def check_batches(job: Job, processes: int) -> None:
    """Raise UsageError where a process would have no calibration windows."""
    recipe = job.recipe
    windows = recipe.calibration.samples if recipe.budget is None else recipe.trial_samples
    if windows < processes:
        raise UsageError(
            f"{processes} processes share {windows} calibration windows. Use more --samples, or fewer processes."
        )
    if job.batch_size is not None and windows < processes * job.batch_size:
        raise UsageError(
            f"--batch-size {job.batch_size} leaves some of {processes} processes without any of {windows} windows. "
            f"Use {windows // processes} or less."
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


def check_gguf(plan: Plan, folder: Path) -> None:
    """Check that the result can be written as a GGUF file."""
    from compress.checkpoints.gguf import check_exportable

    spec = plan.choices[0].spec if plan.choices else plan.spec
    check_exportable(spec.config(torch.float32), folder)


def open_weights(folder: Path, config: Any, family: families.Family) -> LazyWeights:
    weights = LazyWeights(folder)
    shapes = Decoder(config, family, dtype=torch.float32, device=torch.device("cpu")).parameter_shapes()
    tied = [f"{family.head}.weight"] if config.tie_word_embeddings else []
    weights.check_against(shapes, may_miss=tied)
    return weights
