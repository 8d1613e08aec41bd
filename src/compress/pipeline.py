"""From a model and a recipe to a checkpoint: everything checked first, one walk, every part written as it is finished.

Before the walk come what its recipe asks for: a survey of the dense model, and trials where a budget leaves a choice.

The output is built in `<out>.partial` and gets its name by a rename, after it has been reloaded in a clean process.
Nothing volatile (times, paths of this machine) goes into it: the same inputs give the same bytes.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import psutil
from torch import Tensor

from compress.architectures.packed import not_for_vllm, unpacks_while_loading
from compress.architectures.sizes import Size
from compress.checkpoints import files
from compress.checkpoints.adapter import adapter_config, write_adapter
from compress.checkpoints.card import model_card, read_origin
from compress.checkpoints.facts import FACTS, read_facts, read_json
from compress.checkpoints.integrity import check_integrity
from compress.checkpoints.verify import verify, verify_tokens, why_own
from compress.claiming import claimed, kept_journal, parent_folder
from compress.durable import flush_below
from compress.errors import CheckpointError
from compress.models.loading import load_config
from compress.numerics.precision import full_precision
from compress.planning import search
from compress.planning.assembly import new_walk, restored, take_survey
from compress.planning.memory import resident_bytes
from compress.planning.plan import Plan
from compress.planning.prepare import Job, Prepared, plan_job, prepare
from compress.planning.ranks import rank_choices
from compress.progress import Progress, Steps, silent
from compress.provenance import identity
from compress.publishing import is_finished, publish
from compress.streaming.experts import short_of_tokens
from compress.streaming.journal import Journal, sha256, write_tensors
from compress.streaming.processes import ALONE, Processes
from compress.streaming.shared_journal import SharedJournal
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
        with parent_folder(job.partial), claimed(job) if processes.is_first else nullcontext() as lock:
            if job.resume and processes.from_first(processes.is_first and _only_lacks_name(prepared, progress)):
                return _give_name(prepared) if processes.is_first else None
            return _run(prepared, lock, progress, start)


def _run(prepared: Prepared, lock: IO[str] | None, progress: Progress, start: float) -> Result | None:
    """The run itself, or what is left of it, in the folder that is ours by `lock`; begun at `start`."""
    job, processes = prepared.job, prepared.processes
    with _journal(prepared, lock) as journal:
        seconds: dict[str, float] = {}
        with timed(seconds, "survey"):
            survey = _survey(prepared, journal, progress)
        with timed(seconds, "trials"):
            prepared = _chosen(prepared, journal, survey, progress)
        stages, held_out = prepared.plan.stages, job.recipe.held_out_windows
        walk = new_walk(prepared, stages, prepared.windows, held_out, survey)
        resumed = len(journal.entries)
        steps = Steps(progress, "compressing", walk.num_parts, done=resumed)
        if resumed:
            walk.restore(journal.state(), resumed)
        for part in walk.parts(steps.next):
            _write_part(journal, part, walk)
            del part  # it is on disk, and the next is as large
        steps.end()
        walk.streams.release()
        processes.from_first(None)  # all is written
        if not processes.is_first:
            return None
        facts, difference = _complete(prepared, walk, journal, progress)
        seconds |= dict(walk.clock.seconds) | {"total": time.perf_counter() - start}
        return _result(prepared, facts, seconds, difference, resumed)


@contextmanager
def timed(seconds: dict[str, float], kind: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    if (elapsed := time.perf_counter() - start) > 0.001:
        seconds[kind] = elapsed


def _survey(prepared: Prepared, journal: Journal, progress: Progress) -> Survey | None:
    """The survey that the plan asks for, taken once: a run that goes on reads it back."""
    if prepared.plan.survey is SurveyNeed.NONE:
        return None
    if "survey" in journal.findings:
        return restored(prepared, journal.found_tensors("survey"))
    total = num_steps(prepared.config.num_hidden_layers, gradient=SurveyNeed.GRADIENT in prepared.plan.survey)
    steps = Steps(progress, "surveying the dense model", total)
    survey = take_survey(prepared, steps.next)
    assert survey is not None
    steps.end()
    journal.note("survey", None, survey.tensors(), survey.gradients.written if survey.gradients else ())
    return survey


def _chosen(prepared: Prepared, journal: Journal, survey: Survey | None, progress: Progress) -> Prepared:
    """With the plan's choice made, by trial where there is more than one; a run that goes on reads trials back."""
    prepared = _with_rank_choices(prepared, survey)
    if not prepared.plan.choices:
        return prepared
    choices, costs = search.with_costs(prepared, survey)
    steps = Steps(progress, "trying shapes", min(len(choices), search.MOST_TRIALS))

    def measured(place: int) -> float:
        name = f"{TRIAL}{place}"
        if name not in journal.findings:
            trial, cost = search.try_out(prepared, choices[place], survey, steps), costs[place]
            predicted = None if cost is None else cost.total(search.LEFT)
            journal.note(name, {**trial.counts, "predicted": predicted, "divergence": trial.divergence})
        return float(journal.findings[name]["data"]["divergence"])

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


@contextmanager
def _journal(prepared: Prepared, lock: IO[str] | None) -> Iterator[Journal]:
    """The journal of this run, which the first process writes."""
    partial, run, processes = prepared.job.partial, identity(prepared), prepared.processes
    if lock is None:
        yield SharedJournal(partial, run, None, processes)
        return
    with kept_journal(partial, run, lock, resume=prepared.job.resume) as own:
        yield own if processes.count == 1 else SharedJournal(partial, run, own, processes)


def _only_lacks_name(prepared: Prepared, progress: Progress) -> bool:
    """Whether this very run was killed when it was finished and verified, before its output got its name."""
    partial = prepared.job.partial
    if not is_finished(partial):
        return False
    try:
        facts = read_json(partial / FACTS)
        check_integrity(partial, read_facts(partial), checksums=True, progress=progress)
    except CheckpointError:
        return False
    mine = identity(prepared)
    same = all(facts.get(name) == mine[name] for name in ("recipe", "versions"))
    return same and all(mine.get(name) == value for name, value in facts["fingerprints"].items())


def _give_name(prepared: Prepared) -> Result:
    job = prepared.job
    facts = read_json(job.partial / FACTS)
    publish(job.partial, job.out)
    beside = 1 if facts["adapter"] else 0
    return _result(prepared, facts, {"total": 0.0}, None, len(facts["parts"]) - beside)


def _result(
    prepared: Prepared, facts: dict[str, Any], seconds: dict[str, float], difference: float | None, resumed: int
) -> Result:
    return Result(
        out=prepared.job.out,
        architecture=facts["architecture"],
        is_stock=facts["loads_without_our_code"],
        dense=prepared.plan.dense,
        size=Size(**facts["size"]),
        widths=[point["width"] for point in facts["points"]],
        units={kind: tuple(n) if isinstance(n, list) else n for kind, n in facts["units"].items()},
        num_blocks=prepared.plan.spec.num_blocks,
        ranks={linear["linear"]: linear["rank"] for linear in facts["linears"] if "rank" in linear},
        alternatives=facts["alternatives"],
        lost=mean_loss(facts),
        divergence=facts["held_out_divergence"],
        seconds=seconds,
        difference=difference,
        resumed_parts=resumed,
        notes=[*prepared.plan.notes, *expert_notes(facts), *export_notes(prepared.job), *proof_notes(prepared.job.out)],
    )


def mean_loss(facts: dict[str, Any]) -> float | None:
    lost = [linear["lost"] for linear in facts["linears"] if "lost" in linear]
    return sum(lost) / len(lost) if lost and facts["alternatives"] else None


def expert_notes(facts: dict[str, Any]) -> list[str]:
    return short_of_tokens(facts["linears"] or facts["groups"])


def proof_notes(out: Path) -> list[str]:
    reason = why_own(out)
    return [] if reason is None else [f"Reloaded by this package's own reader, not by transformers: {reason}."]


def export_notes(job: Job) -> list[str]:
    if job.export != "gguf":
        return []
    from compress.checkpoints.gguf import reader_notes

    return reader_notes(job.out / f"{job.out.name}.gguf")


def _write_part(journal: Journal, part: FinishedPart, walk: Walk) -> None:
    with walk.clock("write"):
        if not walk.processes.is_first:
            journal.record({}, walk.state())
            return
        written = write_tensors(journal.folder / files.part_file(part.index, walk.num_parts), part.tensors)
        beside = journal.folder / files.adapter_file(part.index)
        entry = {
            "name": part.name,
            "part": written,
            "adapter": write_tensors(beside, part.adapter) if part.adapter else None,
            "tensors": sorted(part.tensors),
            "tensor_bytes": sum(tensor.nbytes for tensor in part.tensors.values()),
            "adapter_bytes": sum(tensor.nbytes for tensor in part.adapter.values()),
            "parameters": part.parameters,
            "points": part.points,
            "groups": part.groups,
            "divergence": part.divergence,
        }
        journal.record(entry, walk.state())


def _complete(prepared: Prepared, walk: Walk, journal: Journal, progress: Progress) -> tuple[dict[str, Any], float]:
    """The rest of the checkpoint, the proof that it reloads, and its name. What it says of itself, and the proof."""
    job, partial, spec = prepared.job, journal.folder, prepared.plan.spec
    steps = Steps(progress, "verifying", 2 if job.export == "gguf" else 1)
    steps.next("reloading in a clean process")
    facts = _facts(prepared, journal)
    widths = tuple(point["width"] for point in facts["points"])
    config = replace(spec, widths=widths, units=facts["units"]).config()
    files.write_json(partial / "config.json", config.to_diff_dict())
    if not spec.architecture.is_stock:
        files.carry_modeling(partial)
    files.copy_companions(prepared.folder, partial)
    files.write_index(partial, journal.entries)
    if facts["adapter"]:
        parts = [partial / entry["adapter"]["file"] for entry in journal.entries if entry["adapter"]]
        written = write_adapter(partial, parts, facts["adapter"])
        facts["parts"][str(written.relative_to(partial))] = sha256(written)
    files.write_json(partial / FACTS, facts)
    (partial / "README.md").write_text(model_card(facts), encoding="utf-8")
    with walk.clock("verify"):
        ids, logits = walk.probe_ids, walk.probe
        assert logits is not None
        verify_tokens(prepared.folder, partial)
        memory = proof_memory(prepared)
        difference = verify(partial, ids, logits, memory=memory)
        if job.export == "gguf":
            if job.max_memory is None:
                memory = max(memory, psutil.virtual_memory().available // 2)
            steps.next("the GGUF file")
            export_gguf(partial, job.out.name, ids, logits, memory=memory)
    flush_below(partial)
    journal.forget()
    publish(partial, job.out)
    steps.end()
    return facts, difference


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


def _facts(prepared: Prepared, journal: Journal) -> dict[str, Any]:
    """What compress.json says: how the checkpoint came about and what is in it."""
    job, entries = prepared.job, journal.entries
    run = identity(prepared)
    return {
        "format": FORMAT,
        "name": f"{job.model.name}-{job.recipe.method}",
        "base_model": job.model.repository or job.model.name,
        "command": job.command,
        "recipe": run["recipe"],
        "architecture": prepared.plan.spec.architecture.class_name,
        "loads_without_our_code": prepared.plan.spec.architecture.is_stock,
        "stages": [stage.model_dump(mode="json") for stage in prepared.plan.stages],
        "trials": found_trials(journal),
        "versions": run["versions"],
        "origin": read_origin(prepared.folder),
        "export": job.export,
        "device": job.device.type,
        "batch_size": run["batch size"],
        "fingerprints": {key: run[key] for key in ("model", "calibration text")},
        "itemsize": prepared.precision.written.itemsize,
        "dense_size": vars(prepared.plan.dense),
        "size": {
            "parameters": sum(entry["parameters"] for entry in entries),
            "bytes": sum(entry["tensor_bytes"] + entry["adapter_bytes"] for entry in entries),
        },
        "adapter": adapter_facts(prepared),
        **storage_facts(prepared.plan),
        "alternatives": [vars(alternative) for alternative in prepared.plan.alternatives],
        "units": dict(prepared.plan.units),
        "held_out_divergence": entries[-1]["divergence"],
        "points": [point for entry in entries for point in entry["points"]],
        "groups": [report for entry in entries for report in entry["groups"] if "group" in report],
        "linears": [report for entry in entries for report in entry["groups"] if "linear" in report],
        "parts": {entry["part"]["file"]: entry["part"]["sha256"] for entry in entries},
    }


def storage_facts(plan: Plan) -> dict[str, Any]:
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


def adapter_facts(prepared: Prepared) -> dict[str, Any] | None:
    """The config of the adapter beside the checkpoint; None where there is none."""
    ranks = {path: each.rank for path, each in prepared.plan.spec.packed.items() if each.rank}
    if not ranks:
        return None
    modules = [name for name, _ in prepared.plan.spec.model().named_modules()]
    return adapter_config(f"{prepared.job.model.name}-{prepared.job.recipe.method}", ranks, modules)


def found_trials(journal: Journal) -> list[dict[str, Any]]:
    """What was tried, in its order."""
    return [finding["data"] for name, finding in journal.findings.items() if name.startswith(TRIAL)]
