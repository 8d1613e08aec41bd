"""Everything about a job is looked at before its first weight is read, and all faults are reported at once."""

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import psutil
import torch
from torch import Tensor

from compress import families
from compress.datasets.windows import calibration_windows
from compress.errors import CheckpointError, Faults, OutputError, UnsupportedModel, UsageError
from compress.job import Job
from compress.models.decoder import Decoder
from compress.models.hub import ModelSource
from compress.models.loading import check_positions, check_vocabulary, load_config, load_tokenizer
from compress.models.stored_files import ADAPTER
from compress.plan import Plan, make_plan
from compress.streaming.weights import READABLE, LazyWeights


@dataclass(frozen=True)
class Precision:
    """The dtype weights are written in, and the one the walk computes in."""

    written: torch.dtype
    computing: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A job whose every input has been looked at."""

    job: Job
    folder: Path
    config: Any
    family: families.Family
    precision: Precision
    plan: Plan
    weights: LazyWeights
    windows: Tensor


def prepare(job: Job) -> Prepared:
    """Raises a CompressError with a line for every fault, and the exit code of the first."""
    folder = job.model.whole_folder()
    config = load_config(folder)
    calibration, faults = job.recipe.calibration, Faults()
    with faults.noted():
        family, plan = families.find(config), plan_job(job, folder, config)
    planned = not faults.found
    with faults.noted():
        check_output(job)
    with faults.noted():
        check_positions(config, calibration.seq_len)
    if planned:
        with faults.noted():
            check_disk(job.out, plan.disk_bytes)
        with faults.noted():
            check_memory(plan.memory_bytes)
        with faults.noted():
            weights = open_weights(folder, config, family)
        if job.export == "gguf":
            with faults.noted():
                check_gguf(plan, folder)
    with faults.noted():
        windows = read_windows(job, folder)
        check_vocabulary(windows, config, folder)
    faults.report()
    return Prepared(
        job=job,
        folder=folder,
        config=config,
        family=family,
        precision=choose_precision(job, folder, config),
        plan=plan,
        weights=weights,
        windows=windows,
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


def plan_job(job: Job, folder: Path, config: Any) -> Plan:
    """Raises UnsupportedModel or UsageError where the recipe does not fit the model."""
    check_dense(folder, config)
    precision = choose_precision(job, folder, config)
    return make_plan(
        job.recipe,
        config,
        families.find(config),
        dtype=precision.written,
        computing=precision.computing,
        cache_memory=cache_memory(job),
    )


def check_dense(folder: Path, config: Any) -> None:
    """Raises UnsupportedModel for a model whose weights are not what they stand for."""
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel(f"{folder} is quantized already. Compress the dense model instead.")
    if (folder / ADAPTER).is_dir():
        raise UnsupportedModel(f"{folder} has an adapter, which would be lost. Compress the dense model instead.")


def stored_dtype(folder: Path) -> torch.dtype | None:
    """What most tensors of a checkpoint are stored in, for a config.json that does not say; None without weights."""
    try:
        stored = Counter(LazyWeights(folder).dtypes.values())
    except CheckpointError:
        return None
    return READABLE.get(stored.most_common(1)[0][0])


def cache_memory(job: Job) -> int:
    return psutil.virtual_memory().available // 2 if job.cache_memory is None else job.cache_memory


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
    if job.resume and not job.partial.exists():
        raise UsageError(f"--resume: there is no unfinished run in {job.partial}. Run it without --resume.")


def aside_of(out: Path) -> Path:
    """Where an output that is replaced waits until the new one has its name."""
    return out.with_name(f"{out.name}.replaced")


def is_replaceable(folder: Path) -> bool:
    return folder.is_dir() and ((folder / "compress.json").is_file() or not any(folder.iterdir()))


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
    """That what will be written can be said in a GGUF file."""
    from compress.checkpoints.gguf import check_exportable

    shape = plan.choices[0].shape if plan.choices else plan.shape
    check_exportable(plan.target.config(shape, torch.float32), folder)


def open_weights(folder: Path, config: Any, family: families.Family) -> LazyWeights:
    weights = LazyWeights(folder)
    shapes = Decoder(config, family, dtype=torch.float32, device=torch.device("cpu")).parameter_shapes()
    tied = [f"{family.head}.weight"] if config.tie_word_embeddings else []
    weights.check_against(shapes, may_miss=tied)
    return weights
