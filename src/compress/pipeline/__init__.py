"""From a model and a recipe to a checkpoint: everything checked first, one walk, every part written as it is finished.

Before the walk come what its recipe asks for: a survey of the dense model, and trials where a budget leaves a choice.

The output gets its name after it has been reloaded in a clean process (`checkpoints/run_folder.py`).
Nothing volatile (times, paths of this machine) goes into it: the same inputs give the same bytes.
"""

import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import psutil

from compress.calibration.depth import Depth
from compress.calibration.observers import GradientFiles
from compress.calibration.processes import ALONE, Processes
from compress.calibration.survey import Survey, SurveyNeed, num_steps
from compress.calibration.walk import FinishedPart, Walk
from compress.checkpoints import files
from compress.checkpoints.metadata import Metadata, input_fingerprint, read_metadata, versions
from compress.checkpoints.run_folder import Part, RunFolder, open_run
from compress.checkpoints.verify import verify, verify_tokens
from compress.datasets.windows import fingerprint
from compress.errors import CheckpointError
from compress.io import write_tensors
from compress.models.loading import load_config
from compress.numerics.sums import full_precision
from compress.pipeline import output
from compress.pipeline.frontier import Frontier
from compress.pipeline.mixture import DEPTH, chosen_types, frontier_points
from compress.pipeline.output import Result
from compress.planning import search
from compress.planning.budget import rank_choices
from compress.planning.memory import resident_bytes, usual_batch_size
from compress.planning.plan import Plan
from compress.planning.prepare import Job, Prepared, depth_site, new_walk, plan_job, prepare, take_survey, type_space
from compress.progress import Progress, Steps, Stopwatch, silent
from compress.version import FORMAT


def plan_only(job: Job) -> Plan:
    """The plan, from config.json alone: the weights need not be on this machine."""
    folder = job.model.config_folder()
    plan = plan_job(job, folder, load_config(folder))
    if plan.opens_types:
        with suppress(CheckpointError):  # no tokenizer is here, and a GGUF file has it
            type_space(job, plan, folder)
    return plan


def run(job: Job, progress: Progress = silent) -> Result:
    """Compress. Raises a CompressError for what a user can mend; before the first part, nothing is left behind."""
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
            if not folder.run.finished:
                return _run(prepared, folder, progress, start)
            if not processes.is_first:
                return None
            folder.publish()
            return output.result_of(prepared, read_metadata(folder.out), {"total": 0.0}, None, len(folder.parts))


def map_frontier(job: Job, between: tuple[int, int], progress: Progress = silent) -> Frontier:
    """Find the types of a GGUF file at sizes from the first to the second, without writing any.

    Raises a CompressError for what a user can mend.
    """
    with full_precision():
        prepared = prepare(job)
        assert prepared.types is not None
        for size in between:
            prepared.types.check(size)
        with open_run(job, {**identity(prepared), "sizes": list(between)}, ALONE, progress) as folder:
            survey = _survey(prepared, folder, progress)
            assert survey is not None
            found = frontier_points(prepared, folder, survey, between, progress)
            found.write(folder.checkpoint)
            output.write_trials(folder.checkpoint, output.trials_of(folder))
            folder.finish()
    return found


def _run(prepared: Prepared, folder: RunFolder, progress: Progress, start: float) -> Result | None:
    """The run itself, or what is left of it; begun at `start`."""
    job, processes, clock = prepared.job, prepared.processes, Stopwatch(prepared.job.device)
    with clock("depth"):
        prepared = _shallower(prepared, folder, progress)
    with clock("survey"):
        survey = _survey(prepared, folder, progress)
    with clock("trials"):
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
    before = {kind: value for kind, value in clock.seconds.items() if value > 0.001}
    seconds = before | walk.clock.seconds | {"total": time.perf_counter() - start}
    return output.result_of(prepared, metadata, seconds, difference, resumed)


def _shallower(prepared: Prepared, folder: RunFolder, progress: Progress) -> Prepared:
    """With the blocks chosen that are left out, where the recipe leaves that to the run."""
    stage = next((stage for stage in prepared.plan.stages if stage.site is Depth), None)
    specs = [choice.spec for choice in prepared.plan.choices] or [prepared.plan.spec]
    most = prepared.plan.space.base.num_blocks - min(spec.num_blocks for spec in specs)
    if stage is None or stage.dropped or not most:
        return prepared
    if DEPTH not in folder.findings:
        steps = Steps(progress, "choosing blocks", 1 + most)
        depth = depth_site(prepared, most, steps.next)
        stage.apply(depth)
        steps.end()
        folder.note(DEPTH, {"dropped": depth.dropped, "divergences": depth.divergences})
    return prepared.without(folder.findings[DEPTH].data["dropped"])


def _survey(prepared: Prepared, folder: RunFolder, progress: Progress) -> Survey | None:
    """The survey that the plan asks for, taken once: a run that goes on reads it back."""
    if prepared.plan.survey is SurveyNeed.NONE or prepared.job.frontier is not None:
        return None
    if "survey" in folder.findings:
        device, files = prepared.job.device, GradientFiles(prepared.job.partial)
        return Survey.of({name: each.to(device) for name, each in folder.found_tensors("survey").items()}, files)
    total = num_steps(prepared.config.num_hidden_layers, gradient=SurveyNeed.GRADIENT in prepared.plan.survey)
    steps = Steps(progress, "surveying the dense model", total)
    survey = take_survey(prepared, steps.next)
    assert survey is not None
    steps.end()
    folder.note("survey", None, survey.tensors(), survey.gradients.written if survey.gradients else ())
    return survey


def _chosen(prepared: Prepared, folder: RunFolder, survey: Survey | None, progress: Progress) -> Prepared:
    """With the plan's choice made, by trial where there is more than one; a run that goes on reads trials back."""
    plan = prepared.plan
    if prepared.types is not None:
        return chosen_types(prepared, folder, survey, progress)
    if plan.ranks is not None:  # each allocation's, now that the dense model has been looked at
        spectra = {} if survey is None else survey.of_blocks(plan.kept).spectra
        found = rank_choices(plan.ranks, prepared.job.recipe.budget, plan.dense, spectra)
        plan = plan.chosen(found[0]) if len(found) == 1 else replace(plan, choices=found)
        prepared = replace(prepared, plan=plan)
    if not plan.choices:
        return prepared
    depth = folder.findings.get(DEPTH)
    choices, costs = search.with_costs(prepared, survey, depth.data["divergences"] if depth else ())
    steps = Steps(progress, "trying shapes", min(len(choices), search.MOST_TRIALS))

    def measured(place: int) -> float:
        name = f"{output.TRIAL}{place}"
        if name not in folder.findings:
            choice, cost = choices[place], costs[place]
            predicted = None if cost is None else cost.total()
            divergence = search.try_out(prepared, choice, survey, steps)
            folder.note(name, {**choice.label, "predicted": predicted, "divergence": divergence})
        return float(folder.findings[name].data["divergence"])

    place = search.choose(costs, measured) if len(choices) > 1 else 0
    return replace(prepared, plan=plan.chosen(choices[place]))


def identity(prepared: Prepared) -> dict[str, Any]:
    """All that the output's bytes depend on."""
    job, batch_size = prepared.job, prepared.plan.room.batch_size
    return {
        "recipe": job.recipe.model_dump(mode="json"),
        "model": input_fingerprint(prepared.folder, prepared.weights),
        "calibration text": fingerprint(prepared.windows),
        "format": FORMAT,
        "versions": versions(),
        "export": job.export,
        "device": job.device.type,
        # Windows at a time, where it is not the usual number: as the user said it, or as memory allows.
        "batch size": job.batch_size if batch_size == usual_batch_size(job.recipe) else batch_size,
        "number of processes": prepared.processes.count,
        "dtype": str(prepared.written).removeprefix("torch."),
    }


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
    steps.next("reloading")
    metadata = output.write_companions(prepared, folder)
    with walk.clock("verify"):
        ids, logits = walk.probe_ids, walk.probe
        assert logits is not None
        verify_tokens(prepared.folder, target)
        # What the process that reloads the result may take: in less than a model's float32 needs, 16 bits are compared.
        memory = max(prepared.plan.memory_bytes, psutil.virtual_memory().available // 2)
        if job.max_memory is not None:
            memory = max(0, job.max_memory - resident_bytes() - prepared.held)
        if prepared.plan.spec.is_gguf:
            difference = output.write_gguf_file(prepared, folder, ids, logits)
        else:
            difference = verify(target, ids, logits, memory=memory)
            if job.export == "gguf":
                steps.next("the GGUF file")
                output.write_gguf_file(prepared, folder, ids, logits)
    folder.finish()
    steps.end()
    return metadata, difference
