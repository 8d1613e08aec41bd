"""Everything in its order: look, train, write, prove, publish.

The output is built in `<out>.partial`, where the training's state lies too, and gets its name by a rename, after it
has been opened again, measured and reloaded in a clean process. Of several processes all train, and the first writes.
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

from compress.checkpoints.facts import FACTS, read_facts, read_json
from compress.checkpoints.integrity import check_integrity
from compress.checkpoints.reload import compute_in, fits_in_float32
from compress.checkpoints.verify import verify, verify_tokens
from compress.claiming import claimed, kept_journal, parent_folder
from compress.datasets import about
from compress.datasets.windows import fingerprint
from compress.durable import flush_below
from compress.errors import CheckpointError, UsageError
from compress.evaluation.perplexity import perplexity
from compress.models.packed import inputs_as_they_are
from compress.numerics.precision import full_precision
from compress.pipeline import SMALL, proof_notes
from compress.progress import Progress, Steps, silent
from compress.publishing import is_finished, publish
from compress.streaming.journal import Journal
from compress.tuning.looking import Prepared, digest, identity, look
from compress.tuning.settings import TuningJob
from compress.tuning.trained import Settled, open_folder, open_teacher, open_trained
from compress.tuning.training import Course, Training, restore, snapshot
from compress.tuning.writing import Written, tuned_facts, write_facts, write_tuned

PROBE = 128  # tokens whose logits prove that the output reloads
WORSE = 0.05  # of perplexity on another text: what is told


@dataclass(frozen=True)
class Result:
    """
    tuning: what compress.json says of it. dense_bytes, bytes: of the compressed checkpoint and of the tuned one.
    difference: of the reloaded logits, as a share of the largest; None where it was seen before an interruption.
    """

    out: Path
    tuning: dict[str, Any]
    compressed_bytes: int
    bytes: int
    difference: float | None
    resumed_steps: int
    seconds: float
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            **{key: value for key, value in self.tuning.items() if key not in ("compressed_parts", "run")},
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
        run = identity(prepared, accelerator.num_processes, device_of(job, accelerator))
        facts = finished(job, run) if job.resume else None
        accelerator.wait_for_everyone()  # all have looked at the output's place before anything is there
        with parent_folder(job.partial), claimed(job) as lock:
            if facts is not None:
                publish(job.partial, job.out)
                return result(prepared, facts, None, facts["tuning"]["steps"], time.perf_counter() - start)
            with kept_journal(job.partial, run, lock, resume=job.resume) as journal:
                settled, course, resumed = train(prepared, accelerator, journal, progress)
                steps = Steps(progress, "verifying", 1)
                steps.next("measuring and reloading")
                facts, difference = complete(prepared, settled, course, device_of(job, accelerator), digest(run))
                flush_below(job.partial)
                journal.forget()
                publish(job.partial, job.out)
                steps.end()
        accelerator.wait_for_everyone()
        return result(prepared, facts, difference, resumed, time.perf_counter() - start)


def help_to_train(job: TuningJob, accelerator: Accelerator) -> None:
    """What every process but the first one does."""
    prepared = look(job)
    run = identity(prepared, accelerator.num_processes, device_of(job, accelerator))
    facts = finished(job, run) if job.resume else None
    accelerator.wait_for_everyone()
    if facts is None:
        train(prepared, accelerator, None, silent)
        accelerator.wait_for_everyone()


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


def finished(job: TuningJob, run: dict[str, Any]) -> dict[str, Any] | None:
    """What compress.json says where a run was killed when it only lacked its name."""
    if not is_finished(job.partial):
        return None
    try:
        facts = read_json(job.partial / FACTS)
        check_integrity(job.partial, read_facts(job.partial), checksums=True, progress=silent)
    except CheckpointError:
        return None
    same = isinstance(facts.get("tuning"), dict) and facts["tuning"].get("run") == digest(run)
    return facts if same else None


def train(
    prepared: Prepared, accelerator: Accelerator, journal: Journal | None, progress: Progress
) -> tuple[Settled, Course, int]:
    """What training has come to at its best look, its course, and from which step it went on."""
    device = device_of(prepared.job, accelerator)
    trained = open_trained(prepared, device)
    settings, texts = prepared.job.settings, prepared.texts
    looked_at = texts.held_out[: settings.num_looked_at(len(texts.held_out))]
    teacher = open_teacher(prepared, device)
    training = Training(trained, teacher, texts.train, looked_at, settings, prepared.rate, accelerator)
    resumed = go_on(training, journal, accelerator)
    training.run(lambda now: None if journal is None else note(now, journal), progress)
    training.take_best()
    # What is trained is as it was: its files are, too.
    settled = trained.settled() if training.course.best[0] else Settled({}, {})
    return settled, training.course, resumed


def note(training: Training, journal: Journal) -> None:
    """Make a look count; the state of the one before is no longer needed."""
    before = [line["files"][0]["file"] for line in journal.findings.values()]
    journal.note(f"step-{training.course.step:07d}", *snapshot(training))
    for file in before:
        (journal.folder / file).unlink(missing_ok=True)


def go_on(training: Training, journal: Journal | None, accelerator: Accelerator) -> int:
    """Put the training where the journal says that it was. The step that it goes on from, in every process."""
    found: list[Any] = [None]
    if journal is not None and journal.findings:
        last = max(journal.findings)
        line = journal.findings[last]
        found = [(line["data"], str(journal.folder / line["files"][0]["file"]))]
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    if found[0] is None:
        return 0
    data, file = found[0]
    # Copies: tensors of a file lie unaligned, and products of matrices round differently there.
    tensors: dict[str, Tensor] = {name: tensor.clone() for name, tensor in load_file(file).items()}
    restore(training, data, tensors)
    return training.course.step


def complete(
    prepared: Prepared, settled: Settled, course: Course, device: torch.device, run: str
) -> tuple[dict[str, Any], float]:
    """The checkpoint in the partial folder, measured and proved. What it says of itself, and how it reloads."""
    job, partial = prepared.job, prepared.job.partial
    before = measures(prepared, job.folder, device)
    written, after = write_and_measure(prepared, settled, device)
    if after["held_out"] > before["held_out"]:  # rounded to what is stored, it is no better than it was
        settled, course = Settled({}, {}), replace(course, losses=course.losses[:1])
        written, after = write_and_measure(prepared, settled, device)
    teacher = prepared.teacher
    dense = None if teacher is None else measures(prepared, teacher, device, unlike=False)["held_out"]
    facts = tuned_facts(job.folder, written, record(prepared, course, (before, after, dense), run))
    write_facts(partial, facts)
    verify_tokens(job.folder, partial)
    return facts, prove(prepared, facts)


def write_and_measure(prepared: Prepared, settled: Settled, device: torch.device) -> tuple[Written, dict[str, float]]:
    job = prepared.job
    written = write_tuned(job.folder, job.partial, prepared.facts, settled)
    return written, measures(prepared, job.partial, device)


def measures(prepared: Prepared, folder: Path, device: torch.device, *, unlike: bool = True) -> dict[str, float]:
    """The cross-entropy on the held-out windows and on those of another text, of a model that is opened for it."""
    model = open_folder(folder, prepared.computing(device), device)
    texts = {"held_out": prepared.texts.held_out}
    if unlike and prepared.texts.unlike is not None:
        texts["unlike"] = prepared.texts.unlike[1]
    size = prepared.job.settings.batch_size
    return {name: perplexity(model, each, dataset=name, batch_size=size).nll for name, each in texts.items()}


def record(
    prepared: Prepared, course: Course, found: tuple[dict[str, float], dict[str, float], float | None], run: str
) -> dict[str, Any]:
    """What compress.json says of the tuning.

    found: the losses before, the losses after, and the dense model's on the held-out windows.
    """
    job, settings, (before, after, dense) = prepared.job, prepared.job.settings, found
    return {
        "command": job.command,
        "run": run,
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
        "unlike": unlike(prepared, before, after),
    }


def unlike(prepared: Prepared, before: dict[str, float], after: dict[str, float]) -> dict[str, Any] | None:
    """What became of another text. worse: its perplexity has risen by more than a twentieth."""
    if prepared.texts.unlike is None:
        return None
    source, windows = prepared.texts.unlike
    worse = after["unlike"] > before["unlike"] + math.log1p(WORSE)
    found = {"before": before["unlike"], "after": after["unlike"], "worse": worse}
    return {"source": source, "windows": len(windows), **found}


def prove(prepared: Prepared, facts: dict[str, Any]) -> float:
    """By how much the logits of a clean process differ from those of this one, as a share of the largest."""
    partial, cpu = prepared.job.partial, torch.device("cpu")
    memory = max(psutil.virtual_memory().available // 2, SMALL)
    computing = torch.promote_types(prepared.own_dtype, torch.float32)
    # What is packed stays so in memory. Another model that is too large in float32 is held in its own dtype.
    fits = facts["storage"] == "packed" or fits_in_float32(facts["size"]["parameters"], memory)
    model, ids = (
        open_folder(partial, computing if fits else prepared.own_dtype, cpu),
        prepared.texts.held_out[:1, :PROBE],
    )
    compute_in(model, computing)
    with torch.inference_mode(), inputs_as_they_are(model):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return verify(partial, ids, logits, memory=memory)


def result(prepared: Prepared, facts: dict[str, Any], difference: float | None, resumed: int, seconds: float) -> Result:
    return Result(
        out=prepared.job.out,
        tuning=facts["tuning"],
        compressed_bytes=prepared.facts.size.bytes,
        bytes=facts["size"]["bytes"],
        difference=difference,
        resumed_steps=resumed,
        seconds=seconds,
        notes=notes(prepared, facts),
    )


def notes(prepared: Prepared, facts: dict[str, Any]) -> list[str]:
    tuning, found = facts["tuning"], []
    if tuning["best_step"] == 0:
        found.append("Nothing was better on the held-out windows than the checkpoint was: its weights are unchanged.")
    added = facts["size"]["bytes"] - prepared.facts.size.bytes
    if added:
        found.append(f"The new adapter is kept beside the weights and adds {added:,} bytes.")
    other = tuning["unlike"]
    if other is None:
        found.append("No other text is on this machine to see what the training does elsewhere.")
    elif other["worse"]:
        rise = math.expm1(other["after"] - other["before"])
        found.append(
            f"On {other['source']}, which it was not trained on, its perplexity has risen by {rise:.0%}: the text is "
            "too narrow for general use."
        )
    if tuning["data"]["licence"]:
        found.append(f"The licence of {tuning['data']['source']} is {tuning['data']['licence']}.")
    if prepared.facts.export == "gguf":
        found.append("The GGUF file is of the weights before: it was left behind.")
    return [*found, *proof_notes(prepared.job.out)]
