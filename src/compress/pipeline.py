"""From a model and a recipe to a checkpoint: everything checked first, one walk, every part written as it is finished.

Before the walk come what its recipe asks for: a survey of the dense model, and trials where a budget leaves a choice.

The output gets its name after it has been reloaded in a clean process (`checkpoints/run_folder.py`).
Nothing volatile (times, paths of this machine) goes into it: the same inputs give the same bytes.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor

from compress.architectures.packed import not_for_vllm, unpacks_while_loading
from compress.architectures.sizes import Size
from compress.checkpoints import files
from compress.checkpoints.adapter import adapter_config, write_adapter
from compress.checkpoints.card import read_origin, write_card
from compress.checkpoints.metadata import Metadata, input_fingerprint, read_metadata, versions
from compress.checkpoints.run_folder import Part, RunFolder, open_run
from compress.checkpoints.verify import verify, verify_tokens, why_own
from compress.datasets.windows import fingerprint
from compress.io import sha256, write_tensors
from compress.models.loading import load_config
from compress.numerics.precision import full_precision
from compress.planning import search
from compress.planning.assembly import new_walk, restored, take_survey
from compress.planning.memory import resident_bytes, usual_batch_size
from compress.planning.plan import Plan
from compress.planning.prepare import Job, Prepared, plan_job, prepare
from compress.planning.ranks import rank_choices
from compress.progress import Progress, Steps, silent
from compress.streaming.experts import short_of_tokens
from compress.streaming.processes import ALONE, Processes
from compress.streaming.sites import Count
from compress.streaming.survey import Survey, SurveyNeed, num_steps
from compress.streaming.walk import FinishedPart, Walk
from compress.version import FORMAT

TRIAL = "trial "  # before the place of a choice: a trial's name among the findings
SMALL = 5 * 10**8  # bytes: a model below this is reloaded whole, whatever the walk needed


@dataclass(frozen=True)
class Result:
    """
    seconds: by kind of work; `total` is the whole run's, imports left out.
    units: how many of each kind a block keeps. ranks: of the factorised linears, by path; of `num_blocks` blocks.
    alternatives: ways to store the same linears, this one first. lost: of the linears' outputs on the calibration text,
        the share of their energy that the stored ones do not give, the mean over linears; None where none is stored.
    divergence: from the dense model on held-out calibration windows, in nats a token, where it was measured.
    difference: of the reloaded logits, as a share of the largest.
    """

    out: Path
    architecture: str
    is_stock: bool
    dense: Size
    size: Size
    widths: list[int]
    units: dict[str, Count]
    ranks: dict[str, int]
    num_blocks: int
    alternatives: list[dict[str, Any]]
    lost: float | None
    divergence: float | None
    seconds: dict[str, float]
    difference: float | None
    resumed_parts: int
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "architecture": self.architecture,
            "loads_without_our_code": self.is_stock,
            "dense_parameters": self.dense.parameters,
            "parameters": self.size.parameters,
            "removed": 1 - self.size.parameters / self.dense.parameters,
            "dense_bytes": self.dense.bytes,
            "bytes": self.size.bytes,
            "widths": self.widths,
            "units": self.units,
            "ranks": self.ranks,
            "alternatives": self.alternatives,
            "lost_energy": self.lost,
            "held_out_divergence": self.divergence,
            "seconds": {kind: round(value, 3) for kind, value in self.seconds.items()},
            "reload_difference": self.difference,
            "resumed_parts": self.resumed_parts,
            "notes": self.notes,
        }


def plan_only(job: Job) -> Plan:
    """The plan, from config.json alone: the weights need not be on this machine."""
    folder = job.model.config_folder()
    return plan_job(job, folder, load_config(folder))


def run(job: Job, progress: Progress = silent) -> Result:
    """Compress.

    Raises a CompressError for what a user can mend; until the first part is written, nothing is left behind.
    """
    result = run_together(job, ALONE, progress)
    assert result is not None
    return result


def run_together(job: Job, processes: Processes, progress: Progress = silent) -> Result | None:
    """`run` in one of several processes. The first writes, proves and has the result; the others have None."""
    with full_precision():
        start = time.perf_counter()
        prepared = prepare(job, processes)
        processes.gathered(None)  # the others look at the output's place before the first makes anything there
        with open_run(job, identity(prepared), processes, progress) as folder:
            if folder.run.finished:
                return _give_name(prepared, folder) if processes.is_first else None
            return _run(prepared, folder, progress, start)


def _run(prepared: Prepared, folder: RunFolder, progress: Progress, start: float) -> Result | None:
    """The run itself, or what is left of it; begun at `start`."""
    job, processes = prepared.job, prepared.processes
    seconds: dict[str, float] = {}
    with timed(seconds, "survey"):
        survey = _survey(prepared, folder, progress)
    with timed(seconds, "trials"):
        prepared = _chosen(prepared, folder, survey, progress)
    stages, held_out = prepared.plan.stages, job.recipe.held_out_windows
    walk = new_walk(prepared, stages, prepared.windows, held_out, survey)
    resumed = len(folder.parts)
    steps = Steps(progress, "compressing", walk.num_parts, done=resumed)
    if resumed:
        walk.restore(folder.state(), resumed)
    for part in walk.parts(steps.next):
        _write_part(folder, part, walk)
        del part  # it is on disk, and the next is as large
    steps.end()
    walk.streams.release()
    processes.from_first(None)  # all is written
    if not processes.is_first:
        return None
    metadata, difference = _complete(prepared, walk, folder, progress)
    seconds |= dict(walk.clock.seconds) | {"total": time.perf_counter() - start}
    return _result(prepared, metadata, seconds, difference, resumed)


@contextmanager
def timed(seconds: dict[str, float], kind: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    if (elapsed := time.perf_counter() - start) > 0.001:
        seconds[kind] = elapsed


def _survey(prepared: Prepared, folder: RunFolder, progress: Progress) -> Survey | None:
    """The survey that the plan asks for, taken once: a run that goes on reads it back."""
    if prepared.plan.survey is SurveyNeed.NONE:
        return None
    if "survey" in folder.findings:
        return restored(prepared, folder.found_tensors("survey"))
    total = num_steps(prepared.config.num_hidden_layers, gradient=SurveyNeed.GRADIENT in prepared.plan.survey)
    steps = Steps(progress, "surveying the dense model", total)
    survey = take_survey(prepared, steps.next)
    assert survey is not None
    steps.end()
    folder.note("survey", None, survey.tensors(), survey.gradients.written if survey.gradients else ())
    return survey


def _chosen(prepared: Prepared, folder: RunFolder, survey: Survey | None, progress: Progress) -> Prepared:
    """With the plan's choice made, by trial where there is more than one; a run that goes on reads trials back."""
    prepared = _with_rank_choices(prepared, survey)
    if not prepared.plan.choices:
        return prepared
    choices, costs = search.with_costs(prepared, survey)
    steps = Steps(progress, "trying shapes", min(len(choices), search.MOST_TRIALS))

    def measured(place: int) -> float:
        name = f"{TRIAL}{place}"
        if name not in folder.findings:
            trial, cost = search.try_out(prepared, choices[place], survey, steps), costs[place]
            predicted = None if cost is None else cost.total(search.LEFT)
            folder.note(name, {**trial.counts, "predicted": predicted, "divergence": trial.divergence})
        return float(folder.findings[name].data["divergence"])

    place = search.choose(costs, measured) if len(choices) > 1 else 0
    return replace(prepared, plan=prepared.plan.chosen(choices[place]))


def _with_rank_choices(prepared: Prepared, survey: Survey | None) -> Prepared:
    """With the ranks that each allocation comes to, now that the dense model has been looked at."""
    plan = prepared.plan
    if plan.ranks is None:
        return prepared
    spectra = {} if survey is None else survey.spectra
    found = rank_choices(plan.ranks, prepared.job.recipe.budget, plan.dense, spectra)
    return replace(prepared, plan=plan.chosen(found[0]) if len(found) == 1 else replace(plan, choices=found))


def identity(prepared: Prepared) -> dict[str, Any]:
    """All that the output's bytes depend on."""
    job = prepared.job
    return {
        "recipe": job.recipe.model_dump(mode="json"),
        "model": input_fingerprint(prepared.folder, prepared.weights),
        "calibration text": fingerprint(prepared.windows),
        "format": FORMAT,
        "versions": versions(),
        "export": job.export,
        "device": job.device.type,
        "batch size": batch_size(prepared),
        "number of processes": prepared.processes.count,
        "dtype": str(prepared.precision.written).removeprefix("torch."),
    }


def batch_size(prepared: Prepared) -> int | None:
    """Windows at a time, where it is not the usual number: as the user said it, or as memory allows."""
    chosen, job = prepared.plan.room.batch_size, prepared.job
    return job.batch_size if chosen == usual_batch_size(job.recipe) else chosen


def _give_name(prepared: Prepared, folder: RunFolder) -> Result:
    """Publish what an earlier run had finished."""
    folder.publish()
    return _result(prepared, read_metadata(folder.out), {"total": 0.0}, None, len(folder.parts))


def _result(
    prepared: Prepared, metadata: Metadata, seconds: dict[str, float], difference: float | None, resumed: int
) -> Result:
    return Result(
        out=prepared.job.out,
        architecture=metadata.architecture,
        is_stock=metadata.loads_without_our_code,
        dense=prepared.plan.dense,
        size=Size(metadata.size.parameters, metadata.size.bytes),
        widths=[point.width for point in metadata.points],
        units={kind: tuple(n) if isinstance(n, list) else n for kind, n in metadata.units.items()},
        num_blocks=prepared.plan.spec.num_blocks,
        ranks={linear.linear: linear.rank for linear in metadata.linears if linear.rank is not None},
        alternatives=[each.to_dict() for each in metadata.alternatives],
        lost=mean_loss(metadata),
        divergence=metadata.held_out_divergence,
        seconds=seconds,
        difference=difference,
        resumed_parts=resumed,
        notes=[
            *prepared.plan.notes,
            *expert_notes(metadata),
            *export_notes(prepared.job),
            *proof_notes(prepared.job.out),
        ],
    )


def mean_loss(metadata: Metadata) -> float | None:
    lost = [linear.lost for linear in metadata.linears if linear.lost is not None]
    return sum(lost) / len(lost) if lost and metadata.alternatives else None


def expert_notes(metadata: Metadata) -> list[str]:
    return short_of_tokens([linear.to_dict() for linear in metadata.linears] or metadata.groups)


def proof_notes(out: Path) -> list[str]:
    reason = why_own(out)
    return [] if reason is None else [f"Reloaded by this package's own reader, not by transformers: {reason}."]


def export_notes(job: Job) -> list[str]:
    if job.export != "gguf":
        return []
    from compress.checkpoints.gguf import reader_notes

    return reader_notes(job.out / f"{job.out.name}.gguf")


def _write_part(folder: RunFolder, part: FinishedPart, walk: Walk) -> None:
    with walk.clock("write"):
        if not walk.processes.is_first:
            folder.record(Part(), walk.state())
            return
        weights = write_tensors(folder.checkpoint / files.part_file(part.index, walk.num_parts), part.tensors)
        beside = folder.partial / files.adapter_file(part.index)
        adapter = write_tensors(beside, part.adapter) if part.adapter else None
        report = {
            "tensors": sorted(part.tensors),
            "tensor_bytes": sum(tensor.nbytes for tensor in part.tensors.values()),
            "adapter_bytes": sum(tensor.nbytes for tensor in part.adapter.values()),
            "parameters": part.parameters,
            "points": part.points,
            "groups": part.groups,
            "divergence": part.divergence,
        }
        folder.record(Part(weights=weights, adapter=adapter, report=report), walk.state())


def _complete(prepared: Prepared, walk: Walk, folder: RunFolder, progress: Progress) -> tuple[Metadata, float]:
    """The rest of the checkpoint, the proof that it reloads, and its name. What it says of itself, and the proof."""
    job, target = prepared.job, folder.checkpoint
    steps = Steps(progress, "verifying", 2 if job.export == "gguf" else 1)
    steps.next("reloading in a clean process")
    metadata = _write_companions(prepared, folder)
    with walk.clock("verify"):
        ids, logits = walk.probe_ids, walk.probe
        assert logits is not None
        verify_tokens(prepared.folder, target)
        memory = proof_memory(prepared)
        difference = verify(target, ids, logits, memory=memory)
        if job.export == "gguf":
            if job.max_memory is None:
                memory = max(memory, psutil.virtual_memory().available // 2)
            steps.next("the GGUF file")
            export_gguf(target, job.out.name, ids, logits, memory=memory)
    folder.finish()
    steps.end()
    return metadata, difference


def _write_companions(prepared: Prepared, folder: RunFolder) -> Metadata:
    """All files of the checkpoint but its parts."""
    plan, target, reports = prepared.plan, folder.checkpoint, [part.report for part in folder.parts]
    adapter = adapter_metadata(prepared)
    parts = {part.weights.file: part.weights.sha256 for part in folder.parts if part.weights}
    if adapter is not None:
        shares = [folder.partial / part.adapter.file for part in folder.parts if part.adapter]
        written = write_adapter(target, shares, adapter)
        parts[str(written.relative_to(target))] = sha256(written)
    metadata = _metadata(prepared, folder, adapter, parts)
    config = replace(plan.spec, widths=tuple(point.width for point in metadata.points), units=plan.units).config()
    files.write_json(target / "config.json", config.to_diff_dict())
    if not plan.spec.architecture.is_stock:
        files.carry_modeling(target)
    files.copy_companions(prepared.folder, target)
    files.write_index(
        target,
        {name: part.weights.file for part in folder.parts if part.weights for name in part.report["tensors"]},
        total_bytes=sum(report["tensor_bytes"] for report in reports),
        total_parameters=sum(report["parameters"] for report in reports),
    )
    metadata.write(target)
    write_card(target, metadata)
    return metadata


def export_gguf(folder: Path, name: str, ids: Tensor, logits: Tensor, *, memory: int) -> None:
    """A GGUF file of the finished checkpoint, in its folder, read back before it counts."""
    from compress.checkpoints.gguf import verify_gguf, write_gguf

    file = folder / f"{name}.gguf"
    write_gguf(folder, file, name=name)
    verify_gguf(folder, file, ids, logits, memory=memory)


def proof_memory(prepared: Prepared) -> int:
    """Bytes that the process which reloads the result may take beside its interpreter, which is as large as ours."""
    limit = prepared.job.max_memory
    return max(prepared.plan.memory_bytes, SMALL) if limit is None else max(0, limit - resident_bytes() - prepared.held)


def _metadata(prepared: Prepared, folder: RunFolder, adapter: dict[str, Any] | None, parts: dict[str, str]) -> Metadata:
    """
    adapter: its config. parts: the sha256 of the files of weights.
    """
    job, plan = prepared.job, prepared.plan
    run, reports = folder.run.identity, [part.report for part in folder.parts]
    groups = [group for report in reports for group in report["groups"]]
    return Metadata.model_validate(
        {
            "format": FORMAT,
            "name": f"{job.model.name}-{job.recipe.method}",
            "base_model": job.model.repository or job.model.name,
            "command": job.command,
            "recipe": run["recipe"],
            "architecture": plan.spec.architecture.class_name,
            "loads_without_our_code": plan.spec.architecture.is_stock,
            "stages": [stage.model_dump(mode="json") for stage in plan.stages],
            "trials": found_trials(folder),
            "versions": run["versions"],
            "origin": read_origin(prepared.folder),
            "export": job.export,
            "device": job.device.type,
            "batch_size": run["batch size"],
            "fingerprints": {key: run[key] for key in ("model", "calibration text")},
            "itemsize": prepared.precision.written.itemsize,
            "dense_size": vars(plan.dense),
            "size": {
                "parameters": sum(report["parameters"] for report in reports),
                "bytes": sum(report["tensor_bytes"] + report["adapter_bytes"] for report in reports),
            },
            "adapter": adapter,
            **storage_metadata(plan),
            "alternatives": [vars(alternative) for alternative in plan.alternatives],
            "units": {kind: n if isinstance(n, int) else list(n) for kind, n in plan.units.items()},
            "held_out_divergence": reports[-1]["divergence"],
            "points": [point for report in reports for point in report["points"]],
            "groups": [group for group in groups if "group" in group],
            "linears": [group for group in groups if "linear" in group],
            "parts": parts,
        }
    )


def storage_metadata(plan: Plan) -> dict[str, Any]:
    """How linears are stored, all alike, and what that asks of those who load them."""
    storage = next(iter(plan.spec.storage.values()), None)
    if storage is None:
        return {"storage": None, "quantized": False, "unpacks_while_loading": False, "not_for_vllm": None}
    return {
        "storage": storage.form,
        "quantized": storage.bits is not None,
        "unpacks_while_loading": unpacks_while_loading(storage, plan.spec.architecture.dense.model_type),
        "not_for_vllm": not_for_vllm(storage, max(each.rank for each in plan.spec.storage.values())),
    }


def adapter_metadata(prepared: Prepared) -> dict[str, Any] | None:
    """The config of the adapter beside the checkpoint; None where there is none."""
    ranks = {path: each.rank for path, each in prepared.plan.spec.packed.items() if each.rank}
    if not ranks:
        return None
    modules = [name for name, _ in prepared.plan.spec.model().named_modules()]
    return adapter_config(f"{prepared.job.model.name}-{prepared.job.recipe.method}", ranks, modules)


def found_trials(folder: RunFolder) -> list[dict[str, Any]]:
    """What was tried, in its order."""
    return [finding.data for name, finding in folder.findings.items() if name.startswith(TRIAL)]
