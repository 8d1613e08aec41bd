"""Check a job before its first weight is read, and report all problems at once; build its survey and its walk."""

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from compress import families
from compress.calibration.depth import Depth, DroppedBlocks
from compress.calibration.observers import GradientFiles, LinearObserver, UnitObserver
from compress.calibration.processes import ALONE, Processes
from compress.calibration.roundings import RoundedModel, RoundingObserver
from compress.calibration.streams import Batch, CacheFolder, split_windows, spread
from compress.calibration.survey import Survey, SurveyNeed, Surveyor, survey_samples
from compress.calibration.walk import Walk, WalkSettings
from compress.calibration.weights import READABLE, LazyWeights, PartLoader
from compress.checkpoints.files import companions
from compress.checkpoints.output_folder import Output, check_output
from compress.datasets.windows import calibration_windows
from compress.errors import CheckpointError, OutputError, Problems, UnsupportedModel, UsageError
from compress.evaluation import llamacpp
from compress.models.decoder import Decoder
from compress.models.loading import check_positions, check_vocabulary, load_config, load_tokenizer, with_blocks
from compress.models.tensor_files import ADAPTER, SafetensorsFolder
from compress.planning.memory import Footprint, Room, fit_to_limit, resident_bytes, usual_batch_size
from compress.planning.plan import Plan, make_plan
from compress.planning.types import TypeSpace, open_stage
from compress.recipe import Recipe
from compress.stages._stage import StageConfig

# Bytes that the interpreter holds more in the midst of a run than before it: libraries that are imported on the way,
# and small pieces of freed memory, which are not given back.
GROWTH = 64 * 10**6
PROBE_TOKENS = 64
DEPTH_SHARE = 16  # one calibration window in 16 passes the model without each choice of blocks
FREE_SHARE = 0.25  # of a uniform allocation's neurons: a free one leaves no block less


@dataclass(frozen=True, kw_only=True)
class Job(Output):
    """A model, a recipe and where the result goes.

    command: how a user would ask for it again; it goes into the model card.
    export: `hf` for the checkpoint folder alone, `gguf` for a GGUF file in it as well.
    batch_size: windows at a time; None for about 8192 tokens.
    cache_memory: bytes of activations to hold in memory; None for half of what is free.
    max_memory: bytes that the run may hold at once, the process that reloads the result included; None for no limit.
    frontier: a folder that says what types of matrices cost, found before; None to find it.
    """

    recipe: Recipe
    command: str
    export: Literal["hf", "gguf"] = "hf"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int | None = None
    cache_memory: int | None = None
    max_memory: int | None = None
    data_dir: Path | None = None
    frontier: Path | None = None

    @property
    def output_name(self) -> str:
        """What the result calls itself."""
        return f"{self.model.name}-{self.recipe.method}"


@dataclass(frozen=True)
class Prepared:
    """A job whose inputs have all been checked.

    written, computing: the dtype weights are written in, and the one the walk computes in.
    processes: those that do it together. held: bytes that this one held before.
    types: what the result can come to, where the types of its matrices are to be found.
    """

    job: Job
    folder: Path
    config: Any
    written: torch.dtype
    computing: torch.dtype
    plan: Plan
    weights: LazyWeights
    windows: Tensor
    held: int
    types: TypeSpace | None = None
    processes: Processes = ALONE

    @property
    def family(self) -> families.Family:
        """The dense model's."""
        return families.find(self.config)

    @property
    def loader(self) -> PartLoader:
        """Loads parts of the dense model."""
        decoder = Decoder(self.config, self.family, dtype=self.computing, device=self.job.device)
        return PartLoader(decoder, self.weights)

    def without(self, dropped: Sequence[int]) -> "Prepared":
        """Once it is known which blocks, if any, are left out, in the order in which they go."""
        plan, folder, name = self.plan.without(dropped), self.folder, self.job.output_name
        return replace(self, plan=plan, types=None if self.types is None else TypeSpace.of(plan, folder, name))

    def batch_size(self, windows: Tensor) -> int:
        """Windows per batch, few enough that every process gets one."""
        return max(1, min(self.plan.room.batch_size, len(windows) // self.processes.count))


def prepare(job: Job, processes: Processes = ALONE) -> Prepared:
    """Check everything. Raises a CompressError with a line for every problem and the exit code of the first."""
    folder = job.model.whole_folder()
    config = load_config(folder)
    problems, held, weights, types = Problems(), resident_bytes(), None, None
    plan = problems.check(plan_job, job, folder, config, processes)
    problems.check(check_output, job)
    problems.check(check_batches, job, processes.count)
    problems.check(check_positions, config, job.recipe.calibration.seq_len)
    if plan is not None:
        writes_gguf = job.export == "gguf" or plan.spec.is_gguf
        disk = plan.disk_bytes + (plan.spec.size.bytes if writes_gguf else 0)
        problems.check(check_machine, job.out, disk, plan.memory_bytes * processes.local_count)
        weights = problems.check(open_weights, folder, config, families.find(config))
        problems.check(companions, folder)
        if plan.opens_types:
            types = problems.check(type_space, job, plan, folder)
        elif writes_gguf:
            problems.check(check_gguf, plan, folder)
    windows = problems.check(read_windows, job, folder, config)
    problems.report()
    assert plan is not None
    assert weights is not None
    assert windows is not None
    dtypes = choose_dtypes(job, folder, config)
    return Prepared(job, folder, config, *dtypes, plan, weights, windows, held, types, processes)


def read_windows(job: Job, folder: Path, config: Any) -> Tensor:
    calibration = job.recipe.calibration
    windows = calibration_windows(
        calibration.source,
        load_tokenizer(folder),
        num_samples=calibration.samples,
        seq_len=calibration.seq_len,
        seed=job.recipe.seed,
        data_dir=job.data_dir,
    )
    check_vocabulary(windows, config, folder)
    return windows


def choose_dtypes(job: Job, folder: Path, config: Any) -> tuple[torch.dtype, torch.dtype]:
    """What is written, and for the walk float32 whatever the weights are stored in, float64 for float64 models."""
    written = getattr(torch, job.recipe.dtype) if job.recipe.dtype else config.dtype
    if written is None:  # that of most tensors, where there are weights here
        with suppress(CheckpointError):
            stored = Counter(tensor.dtype for tensor in SafetensorsFolder(folder).tensors.values())
            written = READABLE.get(stored.most_common(1)[0][0])
    written = written or torch.float32
    return written, (torch.float64 if written == torch.float64 else torch.float32)


def plan_job(job: Job, folder: Path, config: Any, processes: Processes = ALONE) -> Plan:
    """Plan a job. Raises where the recipe does not fit the model, or the run does not fit the memory."""
    family = families.find(config)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel(f"{folder} is quantized already. Compress the dense model instead.")
    if (folder / ADAPTER).is_dir():
        raise UnsupportedModel(f"{folder} has an adapter, which would be lost. Compress the dense model instead.")
    (written, computing), cache_memory = choose_dtypes(job, folder, config), job.cache_memory
    if cache_memory is None:
        cache_memory = psutil.virtual_memory().available // 2 // processes.local_count
    room = Room(job.batch_size or usual_batch_size(job.recipe), cache_memory)
    make = partial(make_plan, job.recipe, config, family, dtype=written, computing=computing)
    plan = make(room=room)
    if job.max_memory is None:
        return plan
    before, footprint = resident_bytes(), Footprint(plan.stages, config, family, computing)
    # The process that reloads the result takes it part by part, unless its form cannot stay on disk.
    whole = plan.packs or job.export == "gguf"
    proof = 2 * (plan.dense.bytes if whole else footprint.part * footprint.itemsize)

    def need(room: Room) -> int:
        return max(footprint.needs(job.recipe.calibration, room)[0], before + proof)

    room = fit_to_limit(room, job.max_memory, before + GROWTH, need, fixed_batch=job.batch_size is not None)
    plan = make(room=room)
    note = (
        f"Within {job.max_memory / 1e9:.1f} GB: {room.batch_size} windows at a time, activations beyond "
        f"{room.cache_memory / 1e9:.1f} GB on disk."
    )
    return replace(plan, notes=[*plan.notes, note])


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


def check_machine(out: Path, disk: int, memory: int) -> None:
    """Raise a CompressError where there is less disk for the output, or less memory, in bytes."""
    problems, total = Problems(), psutil.virtual_memory().total
    parent = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if (free := shutil.disk_usage(parent).free) < disk:
        what = f"The run needs {disk / 1e9:.1f} GB of disk, {parent} has {free / 1e9:.1f} GB."
        problems.found.append(OutputError(f"{what} Free some."))
    if total < memory:
        what = f"The run needs {memory / 1e9:.1f} GB of memory, this machine has {total / 1e9:.1f} GB."
        remedy = "Use fewer --samples, a shorter --seq-len or a smaller --cache-memory."
        problems.found.append(UsageError(f"{what} {remedy}"))
    problems.report()


def check_gguf(plan: Plan, folder: Path) -> None:
    from compress.checkpoints.gguf import check_exportable

    spec = plan.choices[0].spec if plan.choices else plan.spec
    if (spec.storage or plan.opens_types) and not spec.is_gguf:
        raise UnsupportedModel(
            "A GGUF file has no linears as other engines pack them, and no adapters. Quantize into its own types "
            "(compress quantize --type Q4_K_M), or merge them (--materialize)."
        )
    check_exportable(spec.config(torch.float32), folder)


def type_space(job: Job, plan: Plan, folder: Path) -> TypeSpace:
    """The types that matrices may get. Raises UsageError for a size that neither types nor depth come to."""
    if plan.spec.is_gguf or job.export == "gguf":
        check_gguf(plan, folder)
    assert job.recipe.budget is not None
    limit, found, shallowest = job.recipe.budget.target_size, TypeSpace.of(plan, folder, job.output_name), None
    if limit is None:  # a time, which llama.cpp will say
        llamacpp.package()
        return found
    if "blocks" in plan.spec.undecided and not found.least <= limit < found.most:
        one = plan.without(range(1, plan.spec.num_blocks))
        shallowest = TypeSpace.of(one, folder, job.output_name).least
    found.check(limit, shallowest)
    return found


def open_weights(folder: Path, config: Any, family: families.Family) -> LazyWeights:
    weights = LazyWeights(folder)
    shapes = Decoder(config, family, dtype=torch.float32, device=torch.device("cpu")).parameter_shapes()
    tied = [f"{family.head}.weight"] if config.tie_word_embeddings else []
    weights.check_against(shapes, may_miss=tied)
    return weights


# The survey and the walk of a prepared job.


def depth_site(
    prepared: Prepared,
    wanted: int,
    begin: Callable[[str], None],
    enough: Callable[[Depth], bool] = lambda _depth: False,
) -> Depth:
    """The dense model's blocks with some of the calibration windows. wanted, enough: as `Depth` has them."""
    windows = spread(prepared.windows, max(len(prepared.windows) // DEPTH_SHARE, 2, prepared.processes.count))
    batches = split_windows(windows, prepared.batch_size(windows), held_out=0)
    return Depth(prepared.loader, batches, wanted, begin, prepared.processes, enough)


def take_survey(prepared: Prepared, begin: Callable[[str], None]) -> Survey | None:
    """Survey the dense model as the plan's stages require; None if none does."""
    need = prepared.plan.survey
    if need is SurveyNeed.NONE:
        return None
    loader, processes = prepared.loader, prepared.processes
    decoder = loader.decoder
    plan, budget, files = prepared.plan, prepared.job.recipe.budget, GradientFiles(prepared.job.partial)
    count, seq_len = prepared.windows.shape
    windows = spread(prepared.windows, max(survey_samples(count, seq_len, decoder.dense_width), processes.count))
    share = FREE_SHARE if budget is not None and budget.allocation == "free" else 1
    fewest = dict[str, int]()  # the smallest count of each kind of unit that the choices have
    if SurveyNeed.UNITS in need:
        for kind in (stage.opens for stage in plan.stages):
            if kind is not None and kind in plan.spec.units:
                fewest[kind] = max(1, int(share * min(int(choice.counts[kind]) for choice in plan.choices)))
    watch = next((watch for stage in plan.stages if (watch := stage.requires.watch) is not None), None)
    observing = (watch, files, decoder, processes)
    rounding = None
    if SurveyNeed.TYPES in need:
        rounding = RoundingObserver(*observing, candidates=open_stage(plan).candidates, stored=prepared.written)
    surveyor = Surveyor(
        loader,
        split_windows(windows, prepared.batch_size(windows), held_out=0),
        CacheFolder(decoder, prepared.job.partial),
        memory=plan.room.cache_memory,
        observer=rounding or LinearObserver(*observing),
        units=UnitObserver(fewest, decoder.device, processes),
        processes=processes,
    )
    survey = surveyor.run(gradient=SurveyNeed.GRADIENT in need, stream=SurveyNeed.STREAM in need, begin=begin)
    if rounding is None:
        return survey
    if prepared.types is not None and prepared.types.tables:
        rounding.tables(surveyor.loader, surveyor.batches, surveyor.stream)
    return replace(survey, roundings=rounding.found)


def new_walk(
    prepared: Prepared, stages: Sequence[StageConfig], windows: Tensor, held_out: int, survey: Survey | None
) -> Walk:
    job, loader, dropped = prepared.job, prepared.loader, None
    decoder, weights = loader.decoder, prepared.weights
    kept = prepared.plan.kept
    if len(kept) < len(decoder.blocks):
        dropped = DroppedBlocks(loader, kept)
        config, weights = with_blocks(prepared.config, kept), weights.of_blocks(kept)
        decoder = Decoder(config, families.find(config), dtype=prepared.computing, device=job.device)
    settings = WalkSettings(
        layout=prepared.plan.spec.architecture.layout(prepared.written),
        output_dtype=prepared.written,
        batch_size=prepared.batch_size(windows),
        held_out=held_out,
        probe_tokens=PROBE_TOKENS,
        seed=job.recipe.seed,
        cache_memory=prepared.plan.room.cache_memory,
        scratch=job.partial,
        dropped=dropped,
    )
    if dropped is not None and survey is not None:
        survey = survey.of_blocks(kept)
    return Walk(decoder, weights, windows, stages, settings, survey, prepared.processes)


def new_rounded_model(prepared: Prepared, survey: Survey) -> RoundedModel:
    """The dense model on half of a trial's windows, to be rounded."""
    loader, processes = prepared.loader, prepared.processes
    windows = spread(prepared.windows, max(prepared.job.recipe.trial_samples // 2, processes.count))
    parts = windows.split(prepared.batch_size(windows))
    return RoundedModel(
        loader,
        [Batch(index, ids, held_out=True) for index, ids in enumerate(parts)],
        CacheFolder(loader.decoder, prepared.job.partial),
        survey.roundings,
        stored=prepared.written,
        memory=prepared.plan.room.cache_memory,
        processes=processes,
    )
