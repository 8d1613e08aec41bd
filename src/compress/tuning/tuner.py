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
from compress.evaluation.perplexity import perplexity
from compress.models.storage import inputs_as_they_are
from compress.numerics.precision import full_precision
from compress.pipeline import SMALL
from compress.pipeline.output import proof_notes
from compress.progress import Progress, Steps, silent
from compress.tuning.looking import Prepared, identity, look
from compress.tuning.settings import TuningJob
from compress.tuning.trained import Settled, open_folder, open_teacher, open_trained
from compress.tuning.training import Course, Training, restore, snapshot
from compress.tuning.writing import Written, tuned_metadata, write_tuned

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
        accelerator = new_accelerator(job)
        check_processes(job, accelerator)
        if not accelerator.is_main_process:
            help_to_train(job, accelerator)
            return None
        prepared = look(job, progress)
        accelerator.wait_for_everyone()  # all have looked at the output's place before anything is there
        with open_run(job, run_identity(prepared, accelerator), progress=progress) as folder:
            difference, resumed = None, None
            if from_first(accelerator, folder.run.finished):
                folder.publish()
            else:
                settled, course, resumed = train(prepared, accelerator, folder, progress)
                steps = Steps(progress, "verifying", 1)
                steps.next("measuring and reloading")
                difference = complete(prepared, settled, course, device_of(job, accelerator), folder.checkpoint)
                folder.finish()
                steps.end()
        accelerator.wait_for_everyone()
        return result(prepared, read_metadata(job.out), difference, resumed, time.perf_counter() - start)


def help_to_train(job: TuningJob, accelerator: Accelerator) -> None:
    """What every process but the first one does."""
    prepared = look(job)
    accelerator.wait_for_everyone()
    if not from_first(accelerator, None):
        train(prepared, accelerator, None, silent)
    accelerator.wait_for_everyone()


def run_identity(prepared: Prepared, accelerator: Accelerator) -> dict[str, Any]:
    return identity(prepared, accelerator.num_processes, device_of(prepared.job, accelerator))


def from_first(accelerator: Accelerator, data: Any) -> Any:
    """Plain data of the first process, in every process."""
    found = [data]
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    return found[0]


def new_accelerator(job: TuningJob) -> Accelerator:
    """bfloat16 where a GPU multiplies; the parameters that are trained stay in float32."""
    in_16_bits = job.device.type == "cuda" and torch.cuda.is_bf16_supported()
    return Accelerator(cpu=job.device.type == "cpu", mixed_precision="bf16" if in_16_bits else "no")


def device_of(job: TuningJob, accelerator: Accelerator) -> torch.device:
    """This process's: the one that was asked for, or its own among several."""
    return job.device if accelerator.num_processes == 1 else accelerator.device


def check_processes(job: TuningJob, accelerator: Accelerator) -> None:
    size, processes = job.settings.batch_size, accelerator.num_processes
    if size % processes:
        raise UsageError(f"--batch-size {size} is of all {processes} processes together: make it a multiple of them.")


def train(
    prepared: Prepared, accelerator: Accelerator, folder: RunFolder | None, progress: Progress
) -> tuple[Settled, Course, int]:
    """What training has come to at its best look, its course, and from which step it went on."""
    device = device_of(prepared.job, accelerator)
    trained = open_trained(prepared, device)
    settings, texts = prepared.job.settings, prepared.texts
    looked_at = texts.held_out[: settings.num_looked_at(len(texts.held_out))]
    teacher = open_teacher(prepared, device)
    training = Training(trained, teacher, texts.train, looked_at, settings, prepared.rate, accelerator)
    resumed = go_on(training, folder, accelerator)
    training.run(lambda now: None if folder is None else note(now, folder), progress)
    training.take_best()
    # What is trained is as it was: its files are, too.
    settled = trained.settled() if training.course.best[0] else Settled({}, {})
    return settled, training.course, resumed


def note(training: Training, folder: RunFolder) -> None:
    report, tensors = snapshot(training)
    folder.record(Part(report=report), tensors)


def go_on(training: Training, folder: RunFolder | None, accelerator: Accelerator) -> int:
    """Put the training where the run folder says that it was. The step that it goes on from, in every process."""
    found = (folder.parts[-1].report, str(folder.state_file)) if folder is not None and folder.parts else None
    if (found := from_first(accelerator, found)) is None:
        return 0
    data, file = found
    # Copies: tensors of a file lie unaligned, and products of matrices round differently there.
    tensors: dict[str, Tensor] = {name: tensor.clone() for name, tensor in load_file(file).items()}
    restore(training, data, tensors)
    return training.course.step


def complete(prepared: Prepared, settled: Settled, course: Course, device: torch.device, target: Path) -> float:
    """Write the checkpoint, measure and prove it. By how much its logits differ in a clean process (`prove`)."""
    job = prepared.job
    before = measures(prepared, job.folder, device)
    written, after = write_and_measure(prepared, settled, device, target)
    if after["held_out"] > before["held_out"]:  # rounded to what is stored, it is no better than it was
        settled, course = Settled({}, {}), replace(course, losses=course.losses[:1])
        written, after = write_and_measure(prepared, settled, device, target)
    teacher = prepared.teacher
    dense = None if teacher is None else measures(prepared, teacher, device, other_text=False)["held_out"]
    metadata = tuned_metadata(prepared.metadata, written, record(prepared, course, (before, after, dense)))
    metadata.write(target)
    write_card(target, metadata)
    verify_tokens(job.folder, target)
    return prove(prepared, metadata, target)


def write_and_measure(
    prepared: Prepared, settled: Settled, device: torch.device, target: Path
) -> tuple[Written, dict[str, float]]:
    written = write_tuned(prepared.job.folder, target, prepared.metadata, settled)
    return written, measures(prepared, target, device)


def measures(prepared: Prepared, folder: Path, device: torch.device, *, other_text: bool = True) -> dict[str, float]:
    """The cross-entropy on the held-out windows and on those of another text, of a model that is opened for it."""
    model = open_folder(folder, prepared.computing(device), device)
    texts = {"held_out": prepared.texts.held_out}
    if other_text and prepared.texts.unlike is not None:
        texts["other_text"] = prepared.texts.unlike[1]
    size = prepared.job.settings.batch_size
    return {name: perplexity(model, each, dataset=name, batch_size=size).nll for name, each in texts.items()}


def record(
    prepared: Prepared, course: Course, found: tuple[dict[str, float], dict[str, float], float | None]
) -> dict[str, Any]:
    """What compress.json says of the tuning.

    found: the losses before, the losses after, and the dense model's on the held-out windows.
    """
    job, settings, (before, after, dense) = prepared.job, prepared.job.settings, found
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
        "lora": {"rank": settings.lora_rank, "alpha": settings.alpha, "merged": prepared.merge}
        if prepared.what == "lora"
        else None,
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
        "other_text": on_other_text(prepared, before, after),
    }


def on_other_text(prepared: Prepared, before: dict[str, float], after: dict[str, float]) -> dict[str, Any] | None:
    """What became of another text. worse: its perplexity has risen by more than a twentieth."""
    if prepared.texts.unlike is None:
        return None
    source, windows = prepared.texts.unlike
    worse = after["other_text"] > before["other_text"] + math.log1p(WORSE)
    found = {"before": before["other_text"], "after": after["other_text"], "worse": worse}
    return {"source": source, "windows": len(windows), **found}


def prove(prepared: Prepared, metadata: Metadata, target: Path) -> float:
    """By how much the logits of a clean process differ from those of this one, as a share of the largest."""
    cpu = torch.device("cpu")
    memory = max(psutil.virtual_memory().available // 2, SMALL)
    computing = torch.promote_types(prepared.own_dtype, torch.float32)
    # What is packed stays so in memory. Another model that is too large in float32 is held in its own dtype.
    fits = metadata.storage == "packed" or fits_in_float32(metadata.size.parameters, memory)
    model, ids = (
        open_folder(target, computing if fits else prepared.own_dtype, cpu),
        prepared.texts.held_out[:1, :PROBE],
    )
    compute_in(model, computing)
    with torch.inference_mode(), inputs_as_they_are(model):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return verify(target, ids, logits, memory=memory)


def result(
    prepared: Prepared, metadata: Metadata, difference: float | None, resumed: int | None, seconds: float
) -> Result:
    """
    resumed: steps that an earlier run had done; None for all.
    """
    assert metadata.tuning is not None
    return Result(
        out=prepared.job.out,
        tuning=metadata.tuning,
        compressed_bytes=prepared.metadata.size.bytes,
        bytes=metadata.size.bytes,
        difference=difference,
        resumed_steps=metadata.tuning.steps if resumed is None else resumed,
        seconds=seconds,
        notes=notes(prepared, metadata.tuning, metadata.size.bytes - prepared.metadata.size.bytes),
    )


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
