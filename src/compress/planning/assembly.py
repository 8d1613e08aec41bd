"""Build the survey and the walk of a prepared job."""

from collections.abc import Callable, Sequence

from torch import Tensor

from compress.calibration.spectra import GradientFiles, LinearObserver
from compress.calibration.streams import CacheFolder, own_batches, split_windows, spread
from compress.calibration.survey import Survey, SurveyNeed, Surveyor, survey_samples
from compress.calibration.unit_costs import UnitObserver
from compress.calibration.walk import Walk, WalkSettings
from compress.calibration.weights import PartLoader
from compress.models.decoder import Decoder
from compress.planning.prepare import Prepared
from compress.stages._stage import StageConfig

PROBE_TOKENS = 64
FREE_SHARE = 0.25  # of a uniform allocation's neurons: a free one leaves no block less


def new_decoder(prepared: Prepared) -> Decoder:
    return Decoder(prepared.config, prepared.family, dtype=prepared.precision.computing, device=prepared.job.device)


def batch_size(prepared: Prepared, windows: Tensor) -> int:
    """Windows per batch, few enough that every process gets one."""
    share = len(windows) // prepared.processes.count
    return max(1, min(prepared.plan.room.batch_size, share))


def take_survey(prepared: Prepared, begin: Callable[[str], None]) -> Survey | None:
    """Survey the dense model as the plan's stages require; None if none does."""
    need = prepared.plan.survey
    if need is SurveyNeed.NONE:
        return None
    decoder, processes = new_decoder(prepared), prepared.processes
    watch, budget = prepared.plan.watch, prepared.job.recipe.budget
    files = GradientFiles(prepared.job.partial)
    count, seq_len = prepared.windows.shape
    samples = survey_samples(count, seq_len, decoder.dense_width)
    fewest, share = prepared.plan.fewest_units, FREE_SHARE if budget and budget.allocation == "free" else 1
    windows = spread(prepared.windows, max(samples, processes.count))
    surveyor = Surveyor(
        decoder,
        PartLoader(decoder, prepared.weights),
        own_batches(split_windows(windows, batch_size(prepared, windows), held_out=0), processes),
        CacheFolder(decoder, prepared.job.partial),
        memory=prepared.plan.room.cache_memory,
        observer=None if watch is None else LinearObserver(watch, files, decoder, processes),
        units=UnitObserver(
            {kind: max(1, int(share * count)) for kind, count in fewest.items()}, decoder.device, processes
        )
        if SurveyNeed.UNITS in need
        else None,
    )
    return surveyor.run(
        gradient=SurveyNeed.GRADIENT in need, stream=SurveyNeed.STREAM in need, begin=begin, processes=processes
    )


def new_walk(
    prepared: Prepared, stages: Sequence[StageConfig], windows: Tensor, held_out: int, survey: Survey | None
) -> Walk:
    job, precision = prepared.job, prepared.precision
    settings = WalkSettings(
        layout=prepared.plan.spec.architecture.layout(precision.written),
        output_dtype=precision.written,
        batch_size=batch_size(prepared, windows),
        held_out=held_out,
        probe_tokens=PROBE_TOKENS,
        seed=job.recipe.seed,
        cache_memory=prepared.plan.room.cache_memory,
        scratch=job.partial,
    )
    return Walk(new_decoder(prepared), prepared.weights, windows, stages, settings, survey, prepared.processes)


def restored(prepared: Prepared, tensors: dict[str, Tensor]) -> Survey:
    """Restore the survey of an earlier run."""
    on_device = {name: tensor.to(prepared.job.device) for name, tensor in tensors.items()}
    return Survey.of(on_device, GradientFiles(prepared.job.partial))
