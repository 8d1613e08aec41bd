"""Everything about a tuning is looked at before its first weight is read, and all problems are told at once."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import psutil
import torch

from compress.calibration.weights import LazyWeights
from compress.checkpoints.integrity import check_integrity
from compress.checkpoints.metadata import Metadata, input_fingerprint, versions
from compress.checkpoints.output_folder import check_output
from compress.checkpoints.run_folder import own_metadata
from compress.datasets.windows import fingerprint
from compress.errors import Problems, UsageError
from compress.inspection.blueprint import blueprint
from compress.models.loading import check_positions, check_vocabulary, load_config, load_tokenizer
from compress.numerics.precision import check_computing
from compress.progress import Progress, silent
from compress.tuning.linears import stored_in_codes
from compress.tuning.settings import Rate, Settings, TuningJob, What, chosen_rate
from compress.tuning.structure import chosen, num_trained, trainable, why_not_merged
from compress.tuning.texts import Reader, Texts

HELD_DENSE = 0.25  # of the memory that dense copies of stored weights may take
ELSEWHERE = ("wikitext2", "stdlib")  # texts that may be unlike the one that is trained on


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """
    num_trained: numbers that change. num_in_codes: weights that are stored in codes.
    merge: whether what is trained ends in tensors that are there already.
    teacher: the dense model's folder. rate: Adam's.
    """

    job: TuningJob
    metadata: Metadata
    config: Any
    texts: Texts
    what: What
    merge: bool
    num_trained: int
    num_in_codes: int
    rate: Rate
    teacher: Path | None

    @property
    def steps(self) -> int:
        return self.job.settings.num_steps(len(self.texts.train))

    @property
    def own_dtype(self) -> torch.dtype:
        return self.config.dtype or torch.float32

    def computing(self, device: torch.device) -> torch.dtype:
        """What frozen weights are held in; weights that are trained themselves are never held in 16 bits."""
        if self.job.dtype is not None:
            return self.job.dtype
        wide = device.type == "cpu" or self.what in ("factors", "all")
        return torch.promote_types(self.own_dtype, torch.float32) if wide else self.own_dtype

    def is_dequantized(self, device: torch.device) -> bool:
        """Whether weights that are stored in codes are held dense while others are trained.

        By all of the device's memory, not by what is free: a run that goes on is to compute the same bits.
        """
        size = self.num_in_codes * self.computing(device).itemsize
        return not self.job.settings.gradient_checkpointing and size <= HELD_DENSE * total_memory(device)


def total_memory(device: torch.device) -> int:
    """In bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def look(job: TuningJob, progress: Progress = silent) -> Prepared:
    """Raises a CompressError with a line for every problem, and the exit code of the first."""
    folder, settings = job.folder, job.settings
    metadata = own_metadata(folder, "tuned")
    check_integrity(folder, metadata, checksums=True, progress=progress)
    config, model = load_config(folder), blueprint(folder, metadata)
    teacher = None if job.teacher is None else job.teacher.whole_folder()
    problems = Problems()
    with problems.collect():
        what = chosen(settings.train, trainable(metadata, model))
        check_lora(settings, what)
        merge = merged_at_the_end(settings.merge, what, metadata)
    with problems.collect():
        check_output(job)
    if job.dtype is not None:
        with problems.collect():
            check_computing(job.dtype, job.device)
    with problems.collect():
        check_positions(config.get_text_config(), settings.seq_len)
    with problems.collect():
        texts = read_texts(job, metadata)
        check_vocabulary(texts.train, config, folder)
    if teacher is not None:
        with problems.collect():
            check_teacher(folder, config, teacher)
    problems.report()
    return Prepared(
        job=job,
        metadata=metadata,
        config=config,
        texts=texts,
        what=what,
        merge=merge,
        num_trained=num_trained(what, model, config, settings.lora_rank),
        num_in_codes=sum(each.in_features * each.out_features for each in stored_in_codes(model).values()),
        rate=chosen_rate(settings.lr, what),
        teacher=teacher,
    )


def check_lora(settings: Settings, what: What) -> None:
    """Raises UsageError where a LoRA is described that is not trained."""
    usual = {each.name: each.default for each in fields(Settings)}
    names = ("lora_rank", "lora_alpha")
    asked = [f"--{name.replace('_', '-')}" for name in names if getattr(settings, name) != usual[name]]
    if what != "lora" and asked:
        raise UsageError(
            f"{' and '.join(asked)}: of --train lora; what is trained here is: {what}. "
            "Leave it out, or say --train lora where that can be."
        )


def merged_at_the_end(asked: bool | None, what: What, metadata: Metadata) -> bool:
    """Raises UsageError where there is nothing to merge, or where the sum would be of another kind."""
    if what != "lora":
        if asked is not None:
            raise UsageError(f"--merge and --no-merge are of --train lora; what is trained here is: {what}.")
        return True
    reason = why_not_merged(metadata)
    if asked and reason is not None:
        raise UsageError(f"--merge: this LoRA cannot go into the weights: {reason}. Use --no-merge.")
    return reason is None if asked is None else asked


def read_texts(job: TuningJob, metadata: Metadata) -> Texts:
    settings = job.settings
    reader = Reader(load_tokenizer(job.folder), settings.seq_len, settings.seed, job.data_dir)
    return reader.texts(settings.data, settings.num_windows, (*ELSEWHERE, metadata.recipe.calibration.source))


def check_teacher(folder: Path, config: Any, teacher: Path) -> None:
    """That its distribution is over the same tokens."""
    sizes = [each.get_text_config().vocab_size for each in (load_config(teacher), config)]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"--teacher {teacher} has a vocabulary of {sizes[0]:,}, {folder} of {sizes[1]:,}. "
            "Name the dense model that was compressed."
        )


def identity(prepared: Prepared, processes: int, device: torch.device) -> dict[str, Any]:
    """What determines the output's bytes."""
    teacher = prepared.teacher
    return {
        "settings": prepared.job.plain_settings() | asdict(prepared.rate),
        "model": prepared.metadata.parts,
        "teacher": None if teacher is None else input_fingerprint(teacher, LazyWeights(teacher)),
        "text": fingerprint(prepared.texts.train),
        "versions": versions(),
        "processes": processes,
        "device": device.type,
        "dtype": str(prepared.computing(device)).removeprefix("torch."),
        "dequantized": prepared.is_dequantized(device),
    }
