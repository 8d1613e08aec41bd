"""From a model and a recipe to a checkpoint: everything checked first, one walk, every part written as it is finished.

Before the walk come what its recipe asks for: a survey of the dense model, and trials where a budget leaves a choice.

The output is built in `<out>.partial` and gets its name by a rename, after it has been reloaded in a clean process.
Nothing volatile (times, paths of this machine) goes into it: the same inputs give the same bytes.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor

from compress import search
from compress.assembly import new_walk, restored, take_survey
from compress.budget import Choice
from compress.checkpoints import files
from compress.checkpoints.adapter import adapter_config, write_adapter
from compress.checkpoints.card import model_card
from compress.checkpoints.front_matter import read_origin
from compress.checkpoints.sizes import Size
from compress.checkpoints.stored import not_for_vllm, unpacks_while_loading
from compress.checkpoints.targets import Shape
from compress.checkpoints.verify import verify, verify_tokens, why_own
from compress.errors import OutputError
from compress.job import Job
from compress.models.loading import load_config
from compress.numerics.precision import full_precision
from compress.plan import Plan
from compress.preflight import Prepared, aside_of, plan_job, prepare
from compress.provenance import identity
from compress.ranks import rank_choices
from compress.streaming.journal import JOURNAL, Journal, sha256, write_tensors
from compress.streaming.sites import Count
from compress.streaming.survey import Survey, SurveyNeed
from compress.streaming.walk import FinishedPart, Walk

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


Progress = Callable[[str, int, int], None]


def plan_only(job: Job) -> Plan:
    """The plan, from config.json alone: the weights need not be on this machine."""
    folder = job.model.config_folder()
    return plan_job(job, folder, load_config(folder))


def run(job: Job, progress: Progress = lambda name, done, total: None) -> Result:
    """Compress. `progress` hears each finished part's name, its number and how many there are.

    Raises a CompressError for what a user can mend; until the first part is written, nothing is left behind.
    """
    with full_precision():
        start = time.perf_counter()
        prepared = prepare(job)
        if job.resume and (finished := _give_name(prepared)):
            return finished
        with parent_folder(job.partial), open_journal(job.partial, identity(prepared), job.resume) as journal:
            seconds: dict[str, float] = {}
            with timed(seconds, "survey"):
                survey = _survey(prepared, journal, progress)
            with timed(seconds, "trials"):
                prepared = _chosen(prepared, journal, survey, progress)
            stages, held_out = prepared.plan.stages, job.recipe.held_out_windows
            walk = new_walk(prepared, stages, prepared.windows, held_out, survey)
            resumed = len(journal.entries)
            if resumed:
                walk.restore(journal.state(), resumed)
            for part in walk.parts():
                _write_part(journal, part, walk)
                progress(part.name, part.index + 1, walk.num_parts)
            progress("reloading", walk.num_parts, walk.num_parts)
            facts, difference = _complete(prepared, walk, journal)
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
    blocks = prepared.config.num_hidden_layers
    steps = iter(range(1, 2 * blocks + 1))
    total = blocks * (2 if SurveyNeed.GRADIENT in prepared.plan.survey else 1)
    survey = take_survey(prepared, lambda: progress("looking at the dense model", next(steps), total))
    assert survey is not None
    journal.note("survey", None, survey.tensors(), survey.gradients.written if survey.gradients else ())
    return survey


def _chosen(prepared: Prepared, journal: Journal, survey: Survey | None, progress: Progress) -> Prepared:
    """With the plan's choice made, by trial where there is more than one; a run that goes on reads it back."""
    prepared = _with_rank_choices(prepared, survey)
    plan = prepared.plan
    if not plan.choices:
        return prepared
    if "trials" not in journal.findings:
        heard = (number for number in range(1, len(plan.choices) + 1))
        trials = search.compare(
            prepared, survey, lambda trial: progress("trying out shapes", next(heard), len(plan.choices))
        )
        journal.note("trials", search.as_data(trials))
    best = min(journal.findings["trials"]["data"], key=lambda trial: trial["divergence"])
    choice = next(c for c in plan.choices if all(best[kind] == count for kind, count in c.label.items()))
    budget = prepared.job.recipe.budget
    if budget is not None and budget.allocation == "searched":
        choice = _allocated(prepared, choice, journal, survey, progress)
    return replace(prepared, plan=plan.chosen(choice))


def _with_rank_choices(prepared: Prepared, survey: Survey | None) -> Prepared:
    """With the ranks that each allocation comes to, now that the dense model has been looked at."""
    plan = prepared.plan
    if plan.ranks is None:
        return prepared
    spectra = {} if survey is None else survey.spectra
    found = rank_choices(plan.ranks, prepared.job.recipe.budget, plan.dense, spectra)
    return replace(prepared, plan=plan.chosen(found[0]) if len(found) == 1 else replace(plan, choices=found))


def _allocated(
    prepared: Prepared, choice: Choice, journal: Journal, survey: Survey | None, progress: Progress
) -> Choice:
    """The choice with its neurons allocated over the blocks; a run that goes on reads the trials back."""
    budget = prepared.job.recipe.budget
    assert budget is not None
    most = budget.allocation_trials
    if "allocation" not in journal.findings:
        heard = iter(range(1, most + 1))
        trials = search.allocate(
            prepared, choice, survey, lambda trial: progress("trying out allocations", next(heard), most)
        )
        journal.note("allocation", search.as_data(trials))
    best = min(journal.findings["allocation"]["data"], key=lambda trial: trial["divergence"])
    return search.reshaped(choice, tuple(best["neurons"]))


@contextmanager
def parent_folder(partial: Path) -> Iterator[None]:
    """The folder that the output lies in. What had to be made for it goes again if nothing is kept there."""
    made = [folder for folder in partial.absolute().parents if not folder.exists()]
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{partial.parent} cannot be made ({error}). Choose another --out.") from error
    try:
        yield
    finally:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


@contextmanager
def open_journal(partial: Path, run: dict[str, Any], resume: bool) -> Iterator[Journal]:
    """The journal of a run; one that ends before its first part leaves no folder behind."""
    journal = None
    try:
        journal = Journal.resume(partial, run) if resume else Journal.start(partial, run)
        yield journal
    except OSError as error:
        raise OutputError(
            f"{partial} cannot be written ({error}). Free space or choose another --out; "
            "what was finished is kept for --resume."
        ) from error
    finally:
        if journal is not None:
            journal.close()
            if journal.is_empty and partial.exists():
                shutil.rmtree(partial)


def _give_name(prepared: Prepared) -> Result | None:
    """The end of a run that was killed when it was finished and verified, and only lacked its name."""
    job = prepared.job
    facts_file = job.partial / "compress.json"
    if (job.partial / JOURNAL).exists() or not facts_file.is_file():
        return None
    facts = json.loads(facts_file.read_text(encoding="utf-8"))
    mine = identity(prepared)
    same = facts["recipe"] == mine["recipe"] and facts["versions"] == mine["versions"]
    if not same or any(facts["fingerprints"][name] != mine[name] for name in facts["fingerprints"]):
        return None
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
        num_blocks=prepared.plan.num_blocks,
        ranks={linear["linear"]: linear["rank"] for linear in facts["linears"] if "rank" in linear},
        alternatives=facts["alternatives"],
        lost=mean_loss(facts),
        divergence=facts["held_out_divergence"],
        seconds=seconds,
        difference=difference,
        resumed_parts=resumed,
        notes=prepared.plan.notes + export_notes(prepared.job) + proof_notes(prepared.job.out),
    )


def mean_loss(facts: dict[str, Any]) -> float | None:
    lost = [linear["lost"] for linear in facts["linears"] if "lost" in linear]
    return sum(lost) / len(lost) if lost and facts["alternatives"] else None


def proof_notes(out: Path) -> list[str]:
    reason = why_own(out)
    return [] if reason is None else [f"Reloaded by this package's own reader, not by transformers: {reason}."]


def export_notes(job: Job) -> list[str]:
    if job.export != "gguf":
        return []
    from compress.checkpoints.gguf import reader_notes

    return reader_notes(job.out)


def _write_part(journal: Journal, part: FinishedPart, walk: Walk) -> None:
    with walk.clock("write"):
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


def _complete(prepared: Prepared, walk: Walk, journal: Journal) -> tuple[dict[str, Any], float]:
    """The rest of the checkpoint, the proof that it reloads, and its name. What it says of itself, and the proof."""
    job, partial, target = prepared.job, journal.folder, prepared.plan.target
    facts = _facts(prepared, journal)
    widths = tuple(point["width"] for point in facts["points"])
    shape = Shape(widths, facts["units"], prepared.plan.factors, prepared.plan.storage)
    config = target.config(shape, prepared.precision.written)
    files.write_json(partial / "config.json", config.to_diff_dict())
    files.carry_modeling(partial, target.carried)
    files.copy_companions(prepared.folder, partial)
    files.write_index(partial, journal.entries)
    if facts["adapter"]:
        parts = [partial / entry["adapter"]["file"] for entry in journal.entries if entry["adapter"]]
        written = write_adapter(partial, parts, facts["adapter"])
        facts["parts"][str(written.relative_to(partial))] = sha256(written)
    files.write_json(partial / "compress.json", facts)
    (partial / "README.md").write_text(model_card(facts), encoding="utf-8")
    with walk.clock("verify"):
        ids, logits = walk.probe_ids, walk.probe
        assert logits is not None
        verify_tokens(prepared.folder, partial)
        difference = verify(partial, ids, logits, memory=max(prepared.plan.memory_bytes, SMALL))
        if job.export == "gguf":
            export_gguf(partial, job.out.name, ids, logits, memory=prepared.plan.memory_bytes)
    journal.forget()
    publish(partial, job.out)
    return facts, difference


def export_gguf(folder: Path, name: str, ids: Tensor, logits: Tensor, *, memory: int) -> None:
    """A GGUF file of the finished checkpoint, in its folder, read back before it counts."""
    from compress.checkpoints.gguf import verify_gguf, write_gguf

    file = folder / f"{name}.gguf"
    write_gguf(folder, file, name=name)
    verify_gguf(folder, file, ids, logits, memory=max(memory, psutil.virtual_memory().available // 2))


def _facts(prepared: Prepared, journal: Journal) -> dict[str, Any]:
    """What compress.json says: how the checkpoint came about and what is in it."""
    job, entries = prepared.job, journal.entries
    run = identity(prepared)
    return {
        "name": f"{job.model.name}-{job.recipe.method}",
        "base_model": job.model.repository or job.model.name,
        "command": job.command,
        "recipe": run["recipe"],
        "architecture": prepared.plan.target.architecture,
        "loads_without_our_code": prepared.plan.target.is_stock,
        "stages": [stage.model_dump(mode="json") for stage in prepared.plan.stages],
        "trials": found_trials(journal, "trials"),
        "allocation_trials": found_trials(journal, "allocation"),
        "versions": run["versions"],
        "origin": read_origin(prepared.folder),
        "export": job.export,
        "device": job.device.type,
        "batch_size": job.batch_size,
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
    storage = next(iter(plan.storage.values()), None)
    if storage is None:
        return {"storage": None, "quantized": False, "unpacks_while_loading": False, "not_for_vllm": None}
    return {
        "storage": storage.form,
        "quantized": storage.bits is not None,
        "unpacks_while_loading": unpacks_while_loading(storage, plan.target.dense.model_type),
        "not_for_vllm": not_for_vllm(storage, max(each.rank for each in plan.storage.values())),
    }


def adapter_facts(prepared: Prepared) -> dict[str, Any] | None:
    """The config of the adapter beside the checkpoint; None where there is none."""
    storage, written = prepared.plan.storage, prepared.plan.target.layout(prepared.precision.written).written
    ranks = {written(path): each.rank for path, each in storage.items() if each.form == "packed" and each.rank}
    if not ranks:
        return None
    modules = [name for name, _ in prepared.plan.target.model(prepared.plan.shape).named_modules()]
    return adapter_config(f"{prepared.job.model.name}-{prepared.job.recipe.method}", ranks, modules)


def found_trials(journal: Journal, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = journal.findings[name]["data"] if name in journal.findings else []
    return found


def publish(partial: Path, out: Path) -> None:
    """Give the finished folder its name. An output to be replaced is moved aside first and deleted last."""
    aside = aside_of(out)
    if out.exists():
        if aside.exists():
            shutil.rmtree(aside)
        out.rename(aside)
    partial.rename(out)
    if aside.is_symlink():
        aside.unlink()
    elif aside.exists():
        shutil.rmtree(aside)
