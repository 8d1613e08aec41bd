"""Everything in its order: look, train, write, prove, publish.

The output gets its name after it has been opened again, measured and reloaded in a clean process. Of several processes
all train, and the first writes. Nothing but what was trained has other bytes than in the compressed folder: a file in
which nothing was trained is linked or copied, in the others the new numbers take the place of the old ones, so that
every file keeps its size and every other tensor its bytes.
"""

import math
import shutil
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from torch import Tensor

from compress.calibration.weights import ADAPTER_PREFIX
from compress.checkpoints.card import CARD, write_card
from compress.checkpoints.files import ADAPTER_WEIGHTS, adapter_config, write_json
from compress.checkpoints.metadata import METADATA, Metadata, TuningMetadata, read_metadata
from compress.checkpoints.push import own_files
from compress.checkpoints.quality import QUALITY
from compress.checkpoints.reload import compute_in, fits_in_float32
from compress.checkpoints.run_folder import Part, RunFolder, open_run
from compress.checkpoints.verify import verify, verify_tokens
from compress.datasets import about
from compress.datasets.windows import fingerprint
from compress.errors import UsageError
from compress.evaluation.windows import perplexity
from compress.inspection.checkpoint import blueprint
from compress.io import write_tensors
from compress.models.loading import load_config
from compress.models.storage import inputs_as_they_are
from compress.models.stored_loading import read_lora, stored_tensors
from compress.models.tensor_files import ADAPTER, INDEX
from compress.models.untrusted import read_json
from compress.numerics.sums import full_precision
from compress.pipeline.output import proof_notes
from compress.progress import Progress, Steps, silent
from compress.tuning.looking import Prepared, look
from compress.tuning.settings import TuningJob
from compress.tuning.trained import Settled, open_folder, open_teacher, open_trained
from compress.tuning.training import Course, Training, restore, snapshot

PROBE = 128  # tokens whose logits prove that the output reloads
WORSE = 0.05  # of perplexity on another text: what is told
# Of the checkpoint as it was: its metadata and card are written anew, and what was measured is true no more.
LEFT_BEHIND = (METADATA, CARD, QUALITY)
STALE = {"lost", "relative_error"}  # measured of weights that are others now


@dataclass(frozen=True)
class Result:
    """What tuning has come to.

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
        resumed = tuned.tuning.steps if resumed is None else resumed
        told = notes(prepared, tuned.tuning, tuned.size.bytes - compressed.size.bytes)
        sizes, seconds = (compressed.size.bytes, tuned.size.bytes), time.perf_counter() - start
        return Result(job.out, tuned.tuning, *sizes, difference, resumed, seconds, told)


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
    job, settings, texts, other = prepared.job, prepared.job.settings, prepared.texts, None
    if texts.unlike is not None:
        source, windows = texts.unlike
        losses = {"before": before["other_text"], "after": after["other_text"]}
        worse = losses["after"] > losses["before"] + math.log1p(WORSE)
        other = {"source": source, "windows": len(windows), "worse": worse, **losses}
    data = {"fingerprint": fingerprint(texts.train), "windows": len(texts.train), "seq_len": settings.seq_len}
    merged = {"rank": settings.lora_rank, "alpha": settings.alpha, "merged": prepared.merge}
    held_out = {"before": before["held_out"], "after": after["held_out"], "dense": dense}
    return {
        "command": job.command,
        "data": {"source": settings.data, **about(settings.data), **data},
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
        "held_out": {"windows": len(texts.held_out), **held_out},
        "other_text": other,
    }


def prove(prepared: Prepared, metadata: Metadata, target: Path) -> float:
    """By how much the logits of a clean process differ from those of this one, as a share of the largest."""
    memory, own = psutil.virtual_memory().available // 2, prepared.config.dtype or torch.float32
    computing = torch.promote_types(own, torch.float32)
    # What is packed stays so in memory. Another model that is too large in float32 is held in its own dtype.
    fits = metadata.form == "packed" or fits_in_float32(metadata.size.parameters, memory)
    model = open_folder(target, computing if fits else own, torch.device("cpu"))
    compute_in(model, computing)
    ids = prepared.texts.held_out[:1, :PROBE]
    with torch.inference_mode(), inputs_as_they_are(model):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return verify(target, ids, logits, memory=memory)


def notes(prepared: Prepared, tuning: TuningMetadata, added: int) -> list[str]:
    """Say what the user should know of it. added: bytes."""
    found, other = [], tuning.other_text
    if tuning.best_step == 0:
        found.append("Nothing was better on the held-out windows than the checkpoint was: its weights are unchanged.")
    if added:
        found.append(f"The new adapter is kept beside the weights and adds {added:,} bytes.")
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


# The tuned folder.


def write_tuned(source: Path, target: Path, metadata: Metadata, settled: Settled) -> dict[str, Any]:
    """Write everything but compress.json and the card; return what that is to say of it.

    A new adapter is a PEFT folder beside the checkpoint, in the dtype of its other floats; the index counts it in.
    """
    shutil.rmtree(target / ADAPTER, ignore_errors=True)  # of an attempt that rounding has made worse
    stored, changed = stored_tensors(source, read_lora(source)), defaultdict[Path, dict[str, Tensor]](dict)
    for name, tensor in settled.tensors.items():
        place = stored.tensors[str(stored.find(name))]
        changed[place.file.relative_to(source)][place.name] = tensor
    written = {str(file): put_tensors(source / file, target / file, new) for file, new in changed.items()}
    for name in own_files(source, metadata):
        if name in LEFT_BEHIND or name.endswith(".gguf") or name in written:
            continue
        # One file under two names where the disk allows it: files of weights are replaced, never changed.
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).unlink(missing_ok=True)
        if name.endswith(".safetensors"):
            with suppress(OSError):
                (target / name).hardlink_to(source / name)
                continue
        shutil.copyfile(source / name, target / name)
    parts, size = metadata.parts | written, metadata.size
    if not settled.adapter:
        return {"parts": parts, "size": size.to_dict()}
    modules = [path for path, _ in blueprint(source, metadata).named_modules()]
    ranks = {name.removesuffix(".lora_A"): len(A) for name, A in settled.adapter.items() if name.endswith(".lora_A")}
    config, dtype = adapter_config(metadata.name, ranks, modules), load_config(target).dtype or torch.float32
    tensors = {f"{ADAPTER_PREFIX}{name}.weight": each.to("cpu", dtype) for name, each in settled.adapter.items()}
    tensors = {name: each.contiguous() for name, each in tensors.items()}
    (target / ADAPTER).mkdir(exist_ok=True)
    write_json(target / ADAPTER / "adapter_config.json", config)
    parts[ADAPTER_WEIGHTS] = write_tensors(target / ADAPTER_WEIGHTS, tensors).sha256
    numbers = sum(tensor.numel() for tensor in tensors.values())
    index = read_json(target / INDEX)
    index["metadata"]["total_parameters"] += numbers
    write_json(target / INDEX, index)
    count = size.bytes + sum(tensor.nbytes for tensor in tensors.values())
    return {"parts": parts, "size": {"parameters": size.parameters + numbers, "bytes": count}, "adapter": config}


def put_tensors(source: Path, target: Path, new: Mapping[str, Tensor]) -> str:
    """A copy of a safetensors file with other numbers in some of its tensors, in the dtypes that it has; its sha256.

    new: these, by the names that they have there.
    """
    tensors = load_file(source)
    for name, tensor in new.items():
        assert tensor.shape == tensors[name].shape
        tensors[name] = tensor.to("cpu", tensors[name].dtype).contiguous()
    target.parent.mkdir(exist_ok=True)
    return write_tensors(target, tensors).sha256


def tuned_metadata(compressed: Metadata, written: Mapping[str, Any], tuning: Mapping[str, Any]) -> Metadata:
    """That of the tuned checkpoint: the compressed one's, without what is true no more, and the tuning."""
    changes = {
        "name": f"{compressed.name}-tuned",
        "export": "hf",
        "held_out_divergence": None,
        "points": [point.model_dump(mode="json", exclude_unset=True, exclude=STALE) for point in compressed.points],
        "linears": [each.model_dump(mode="json", exclude_unset=True, exclude=STALE) for each in compressed.linears],
        "tuning": {**tuning, "compressed_parts": compressed.parts},
    }
    return Metadata.model_validate({**compressed.to_dict(), **changes, **written})
