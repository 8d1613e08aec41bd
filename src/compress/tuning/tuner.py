"""Everything in its order: look, train, write, prove, publish.

The output gets its name after it has been opened again, measured and reloaded in a clean process. Of several processes
all train, and the first writes.
"""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from torch import Tensor

from compress.checkpoints.card import write_card
from compress.checkpoints.metadata import Metadata, TuningMetadata, read_metadata
from compress.checkpoints.reload import compute_in, fits_in_float32
from compress.checkpoints.run_folder import Part, RunFolder, open_run
from compress.checkpoints.verify import verify, verify_tokens
from compress.datasets import about
from compress.datasets.windows import fingerprint
from compress.errors import UsageError
from compress.evaluation.windows import perplexity
from compress.models.storage import inputs_as_they_are
from compress.numerics.sums import full_precision
from compress.pipeline import SMALL
from compress.pipeline.output import proof_notes
from compress.progress import Progress, Steps, silent
from compress.tuning.looking import Prepared, look
from compress.tuning.settings import TuningJob
from compress.tuning.trained import Settled, open_folder, open_teacher, open_trained
from compress.tuning.training import Course, Training, restore, snapshot
from compress.tuning.writing import tuned_metadata, write_tuned

PROBE = 128  # tokens whose logits prove that the output reloads
WORSE = 0.05  # of perplexity on another text: what is told


@dataclass(frozen=True)
class Result:
    """
    tuning: what compress.json says of it. compressed_bytes, bytes: of the compressed checkpoint and of the tuned one.
    difference: of the reloaded logits, as a share of the largest; None where it was seen before an interruption.
    """

    out: Path
    tuning: TuningMetadata
    compressed_bytes: int
    bytes: int
    difference: float | None
    resumed_steps: int
    seconds: float
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            **{key: value for key, value in self.tuning.to_dict().items() if key != "compressed_parts"},
            "compressed_bytes": self.compressed_bytes,
            "bytes": self.bytes,
            "reload_difference": self.difference,
            "resumed_steps": self.resumed_steps,
            "seconds": round(self.seconds, 3),
            "notes": self.notes,
        }


def tune(job: TuningJob, progress: Progress = silent) -> Result | None:
    """Train and write; None in a process that only helps another.

    Raises a CompressError for what a user can mend; until the first look, nothing is left behind.
    """
    with full_precision():
        start = time.perf_counter()
        # bfloat16 where a GPU multiplies; the parameters that are trained stay in float32.
        in_16_bits = job.device.type == "cuda" and torch.cuda.is_bf16_supported()
        accelerator = Accelerator(cpu=job.device.type == "cpu", mixed_precision="bf16" if in_16_bits else "no")
        device = job.device if accelerator.num_processes == 1 else accelerator.device
        size, processes = job.settings.batch_size, accelerator.num_processes
        if size % processes:
            raise UsageError(
                f"--batch-size {size} is of all {processes} processes together: make it a multiple of them."
            )
        prepared = look(job, progress)
        accelerator.wait_for_everyone()  # all have looked at the output's place before anything is there
        if not accelerator.is_main_process:
            if not from_first(accelerator, None):
                train(prepared, device, accelerator, None, silent)
            accelerator.wait_for_everyone()
            return None
        with open_run(job, prepared.identity(processes, device), progress=progress) as folder:
            difference, resumed = None, None
            if from_first(accelerator, folder.run.finished):
                folder.publish()
            else:
                settled, course, resumed = train(prepared, device, accelerator, folder, progress)
                steps = Steps(progress, "verifying", 1)
                steps.next("measuring and reloading")
                difference = complete(prepared, settled, course, device, folder.checkpoint)
                folder.finish()
                steps.end()
        accelerator.wait_for_everyone()
        compressed, tuned = prepared.metadata, read_metadata(job.out)
        assert tuned.tuning is not None
        return Result(
            out=job.out,
            tuning=tuned.tuning,
            compressed_bytes=compressed.size.bytes,
            bytes=tuned.size.bytes,
            difference=difference,
            resumed_steps=tuned.tuning.steps if resumed is None else resumed,
            seconds=time.perf_counter() - start,
            notes=notes(prepared, tuned.tuning, tuned.size.bytes - compressed.size.bytes),
        )


def from_first(accelerator: Accelerator, data: Any) -> Any:
    """Plain data of the first process, in every process."""
    found = [data]
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    return found[0]


def train(
    prepared: Prepared, device: torch.device, accelerator: Accelerator, folder: RunFolder | None, progress: Progress
) -> tuple[Settled, Course, int]:
    """What training has come to at its best look, its course, and from which step it went on.

    folder: has the state to go on from, and gets that of every look; the first process's alone.
    """
    settings, texts = prepared.job.settings, prepared.texts
    trained = open_trained(prepared, device)
    looked_at = texts.held_out[: settings.num_looked_at(len(texts.held_out))]
    teacher = open_teacher(prepared, device)
    training = Training(trained, teacher, texts.train, looked_at, settings, prepared.rate, accelerator)
    found = (folder.parts[-1].report, str(folder.state_file)) if folder is not None and folder.parts else None
    if (found := from_first(accelerator, found)) is not None:
        # Copies: tensors of a file lie unaligned, and products of matrices round differently there.
        restore(training, found[0], {name: tensor.clone() for name, tensor in load_file(found[1]).items()})
    resumed = training.course.step

    def note(now: Training) -> None:
        if folder is not None:
            report, tensors = snapshot(now)
            folder.record(Part(report=report), tensors)

    training.run(note, progress)
    training.take_best()
    # What is trained is as it was: its files are, too.
    settled = trained.settled() if training.course.best[0] else Settled({}, {})
    return settled, training.course, resumed


def complete(prepared: Prepared, settled: Settled, course: Course, device: torch.device, target: Path) -> float:
    """Write the checkpoint, measure and prove it. By how much its logits differ in a clean process (`prove`)."""
    job, teacher = prepared.job, prepared.teacher
    before = measures(prepared, job.folder, device)
    written = write_tuned(job.folder, target, prepared.metadata, settled)
    after = measures(prepared, target, device)
    if after["held_out"] > before["held_out"]:  # rounded to what is stored, it is no better than it was
        course = replace(course, losses=course.losses[:1])
        written = write_tuned(job.folder, target, prepared.metadata, Settled({}, {}))
        after = measures(prepared, target, device)
    dense = None if teacher is None else measures(prepared, teacher, device, other_text=False)["held_out"]
    metadata = tuned_metadata(prepared.metadata, written, record(prepared, course, before, after, dense))
    metadata.write(target)
    write_card(target, metadata)
    verify_tokens(job.folder, target)
    return prove(prepared, metadata, target)


def measures(prepared: Prepared, folder: Path, device: torch.device, *, other_text: bool = True) -> dict[str, float]:
    """The cross-entropy on the held-out windows and on those of another text, of a model that is opened for it."""
    model = open_folder(folder, prepared.computing(device), device)
    texts = {"held_out": prepared.texts.held_out}
    if other_text and prepared.texts.unlike is not None:
        texts["other_text"] = prepared.texts.unlike[1]
    size = prepared.job.settings.batch_size
    return {name: perplexity(model, each, dataset=name, batch_size=size).nll for name, each in texts.items()}


def record(
    prepared: Prepared, course: Course, before: dict[str, float], after: dict[str, float], dense: float | None
) -> dict[str, Any]:
    """What compress.json says of the tuning. before, after: the losses. dense: the dense model's, held out."""
    job, settings, other = prepared.job, prepared.job.settings, None
    if prepared.texts.unlike is not None:
        source, windows = prepared.texts.unlike
        worse = after["other_text"] > before["other_text"] + math.log1p(WORSE)
        other = {"source": source, "windows": len(windows), "worse": worse}
        other |= {"before": before["other_text"], "after": after["other_text"]}
    merged = {"rank": settings.lora_rank, "alpha": settings.alpha, "merged": prepared.merge}
    return {
        "command": job.command,
        "data": {
            "source": settings.data,
            **about(settings.data),
            "fingerprint": fingerprint(prepared.texts.train),
            "windows": len(prepared.texts.train),
            "seq_len": settings.seq_len,
        },
        "trained": prepared.what,
        "trained_parameters": prepared.num_trained,
        "lora": merged if prepared.what == "lora" else None,
        "distill": settings.distill,
        "teacher": None if job.teacher is None else job.teacher.repository or job.teacher.name,
        "learning_rate": prepared.rate.highest,
        "relative_rate": prepared.rate.relative,
        "batch_size": settings.batch_size,
        "planned_steps": prepared.steps,
        "steps": course.step,
        "best_step": course.best[0],
        "losses": [list(look) for look in course.losses],
        "held_out": {
            "windows": len(prepared.texts.held_out),
            "before": before["held_out"],
            "after": after["held_out"],
            "dense": dense,
        },
        "other_text": other,
    }


def prove(prepared: Prepared, metadata: Metadata, target: Path) -> float:
    """By how much the logits of a clean process differ from those of this one, as a share of the largest."""
    memory, own = max(psutil.virtual_memory().available // 2, SMALL), prepared.config.dtype or torch.float32
    computing = torch.promote_types(own, torch.float32)
    # What is packed stays so in memory. Another model that is too large in float32 is held in its own dtype.
    fits = metadata.storage == "packed" or fits_in_float32(metadata.size.parameters, memory)
    model = open_folder(target, computing if fits else own, torch.device("cpu"))
    compute_in(model, computing)
    ids = prepared.texts.held_out[:1, :PROBE]
    with torch.inference_mode(), inputs_as_they_are(model):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return verify(target, ids, logits, memory=memory)


def notes(prepared: Prepared, tuning: TuningMetadata, added: int) -> list[str]:
    """
    added: bytes.
    """
    found = []
    if tuning.best_step == 0:
        found.append("Nothing was better on the held-out windows than the checkpoint was: its weights are unchanged.")
    if added:
        found.append(f"The new adapter is kept beside the weights and adds {added:,} bytes.")
    other = tuning.other_text
    if other is None:
        found.append("No other text is on this machine to see what the training does elsewhere.")
    elif other.worse:
        rise = math.expm1(other.after - other.before)
        found.append(
            f"On {other.source}, which it was not trained on, its perplexity has risen by {rise:.0%}: the text is "
            "too narrow for general use."
        )
    if tuning.data.license:
        found.append(f"The license of {tuning.data.source} is {tuning.data.license}.")
    if prepared.metadata.export == "gguf":
        found.append("The GGUF file is of the weights before: it was left behind.")
    return [*found, *proof_notes(prepared.job.out)]
