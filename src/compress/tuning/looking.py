"""Everything about a tuning is looked at before its first weight is read, and all problems are told at once.

What of a checkpoint can be trained, and which linears those are, follows from how it is stored and from its family's
table.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from compress import families
from compress.calibration.weights import LazyWeights
from compress.checkpoints.integrity import check_integrity
from compress.checkpoints.metadata import Metadata, input_fingerprint, versions
from compress.checkpoints.output_folder import check_output
from compress.checkpoints.run_folder import own_metadata
from compress.datasets.windows import fingerprint
from compress.errors import Problems, UsageError
from compress.inspection.checkpoint import blueprint
from compress.models.int4 import Int4Linear
from compress.models.loading import check_positions, check_vocabulary, load_config, load_tokenizer
from compress.models.storage import Form, LoraLinear, QuantizedLinear
from compress.numerics.sums import check_computing
from compress.own_model.modeling_compress import AdaptedLinear, CompactLinear, LowRankLinear, PivotLinear
from compress.progress import Progress, silent
from compress.tuning.settings import RATES, Rate, Reader, Settings, Texts, TuningJob, What

HELD_DENSE = 0.25  # of the memory that dense copies of stored weights may take
ELSEWHERE = ("wikitext2", "stdlib")  # texts that may be unlike the one that is trained on
HOW = "compress slim --adapter-rank 0.1"


@dataclass(frozen=True)
class Prepared:
    """A tuning job whose inputs have all been checked.

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

    def computing(self, device: torch.device) -> torch.dtype:
        """What frozen weights are held in; weights that are trained themselves are never held in 16 bits."""
        if self.job.dtype is not None:
            return self.job.dtype
        own, wide = self.config.dtype or torch.float32, device.type == "cpu" or self.what in ("factors", "all")
        return torch.promote_types(own, torch.float32) if wide else own

    def is_dequantized(self, device: torch.device) -> bool:
        """Whether weights that are stored in codes are held dense while others are trained.

        By all of the device's memory, not by what is free: a run that goes on is to compute the same bits.
        """
        size = self.num_in_codes * self.computing(device).itemsize
        return not self.job.settings.gradient_checkpointing and size <= HELD_DENSE * total_memory(device)

    def identity(self, processes: int, device: torch.device) -> dict[str, Any]:
        """What determines the output's bytes."""
        return {
            "settings": self.job.settings.model_dump() | asdict(self.rate),
            "model": self.metadata.parts,
            "teacher": None if self.teacher is None else input_fingerprint(self.teacher, LazyWeights(self.teacher)),
            "text": fingerprint(self.texts.train),
            "versions": versions(),
            "processes": processes,
            "device": device.type,
            "dtype": str(self.computing(device)).removeprefix("torch."),
            "dequantized": self.is_dequantized(device),
        }


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
        what = chosen(settings, trainable(metadata, model))
        reason = why_not_merged(metadata) if what == "lora" else None
        if settings.merge and reason is not None:
            raise UsageError(f"--merge: this LoRA cannot go into the weights: {reason}. Use --no-merge.")
    problems.check(check_output, job)
    if job.dtype is not None:
        problems.check(check_computing, job.dtype, job.device)
    problems.check(check_positions, config.get_text_config(), settings.seq_len)
    with problems.collect():
        reader = Reader(load_tokenizer(folder), settings.seq_len, settings.seed, job.data_dir)
        others = (*ELSEWHERE, metadata.recipe.calibration.source)
        texts = reader.texts(settings.data, settings.num_windows, others)
        check_vocabulary(texts.train, config, folder)
    with problems.collect():
        sizes = [each.get_text_config().vocab_size for each in (load_config(teacher or folder), config)]
        if sizes[0] != sizes[1]:
            raise UsageError(
                f"--teacher {teacher} has a vocabulary of {sizes[0]:,}, {folder} of {sizes[1]:,}. "
                "Name the dense model that was compressed."
            )
    problems.report()
    merge = reason is None if settings.merge is None else settings.merge
    counted = num_trained(what, model, config, settings.lora_rank)
    in_codes = sum(each.in_features * each.out_features for each in stored_in_codes(model).values())
    rate = RATES[what] if settings.lr is None else Rate(settings.lr, relative=False)
    return Prepared(job, metadata, config, texts, what, merge, counted, in_codes, rate, teacher)


# What can be trained, and how it ends.


def trainable(metadata: Metadata, model: nn.Module) -> tuple[What, ...]:
    """What can be trained without another form or another size, but for a LoRA's; the usual one first.

    model: it may be on the meta device. Raises UsageError where nothing can.
    """
    if metadata.form == "compact":
        if not any(linear.first is not None for linear in found(model, CompactLinear).values()):
            raise UsageError(
                "This compact checkpoint has no adapters, and its weights are kept as they are stored: nothing in it "
                f"can be trained. Make one with adapters: {HOW} --compact."
            )
        return ("adapters",)
    if metadata.adapter is not None:
        return ("adapters",)
    if metadata.form == "packed":
        return ("lora",)
    return ("factors", "lora", "all") if thin_linears(model) else ("lora", "all")


def chosen(settings: Settings, possible: tuple[What, ...]) -> What:
    """Raises UsageError for what this checkpoint has not, and where a LoRA is described that is not trained."""
    what = settings.train or possible[0]
    if what not in possible:
        raise UsageError(f"--train {what} is not for this checkpoint. It has: {', '.join(possible)}.")
    of_lora = [name for name in ("lora_rank", "lora_alpha", "merge") if name in settings.model_fields_set]
    if what != "lora" and of_lora:
        raise UsageError(
            f"{' and '.join(of_lora)}: of --train lora; what is trained here is: {what}. "
            "Leave it out, or say --train lora where that can be."
        )
    return what


def why_not_merged(metadata: Metadata) -> str | None:
    """Why what a LoRA adds cannot go into the weights; None where it can."""
    if metadata.form is not None:
        return "its weights are stored in few bits"
    if any(linear.pattern for linear in metadata.linears):
        return "its weights are pruned, and the sum would fill the zeros"
    if any(linear.bits for linear in metadata.linears):
        return "its weights lie on a grid of few bits, and the sum would not"
    if metadata.loads_without_our_code and any(linear.form for linear in metadata.linears):
        return "its weights are multiplied out from low ranks, and the sum would have others"
    return None


def found(model: nn.Module, *kinds: type[Any]) -> dict[str, Any]:
    """The modules of these kinds, by their paths."""
    return {path: module for path, module in model.named_modules() if isinstance(module, kinds)}


def block_linears(model: nn.Module, config: Any) -> dict[str, nn.Linear | LoraLinear]:
    """Every linear of the blocks by its path, shortcuts and the two of a product included."""
    start = f"{families.find(getattr(config, 'text_config', config)).blocks}."
    linears = found(model, nn.Linear, LoraLinear)
    return {path: linear for path, linear in linears.items() if path.startswith(start)}


def thin_linears(model: nn.Module) -> dict[str, LowRankLinear | PivotLinear]:
    return found(model, LowRankLinear, PivotLinear)


def num_trained(what: What, model: nn.Module, config: Any, rank: int) -> int:
    """Count the numbers that training changes. model: on the meta device. rank: of a LoRA."""
    if what in ("factors", "all"):
        parts = [model] if what == "all" else thin_linears(model).values()
        return sum(parameter.numel() for part in parts for parameter in part.parameters())
    linears: Any = (block_linears(model, config) if what == "lora" else found(model, AdaptedLinear)).values()
    ranks = [rank if what == "lora" else Form.of(linear).rank for linear in linears]
    return sum(r * (each.in_features + each.out_features) for r, each in zip(ranks, linears, strict=True))


def stored_in_codes(model: nn.Module) -> dict[str, AdaptedLinear]:
    return found(model, QuantizedLinear, Int4Linear, CompactLinear)
