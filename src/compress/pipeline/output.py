"""What a run writes last, and what it has to say.

Everything of a finished checkpoint but its parts: config, tokenizer, index, compress.json, card, adapter, GGUF file.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.architectures.architecture import Size
from compress.architectures.gguf_types import file_type_of, row_bytes
from compress.calibration.groups import short_of_tokens
from compress.calibration.sites import Count
from compress.checkpoints import files
from compress.checkpoints.card import read_origin, write_card
from compress.checkpoints.files import adapter_config, write_adapter
from compress.checkpoints.metadata import Metadata, read_metadata
from compress.checkpoints.run_folder import RunFolder, clear
from compress.checkpoints.verify import why_own
from compress.io import sha256
from compress.models.packing import not_for_vllm, unpacks_while_loading
from compress.planning.plan import Plan
from compress.planning.prepare import Prepared
from compress.recipe import Recipe
from compress.version import FORMAT

TRIALS = "trials.jsonl"
TRIAL = "trial "  # before the place of a choice: a trial's name among the findings


def write_companions(prepared: Prepared, folder: RunFolder) -> Metadata:
    plan, target, reports = prepared.plan, folder.checkpoint, [part.report for part in folder.parts]
    adapter = adapter_metadata(prepared)
    parts = {part.weights.file: part.weights.sha256 for part in folder.parts if part.weights}
    if adapter is not None:
        shares = [folder.partial / part.adapter.file for part in folder.parts if part.adapter]
        written = write_adapter(target, shares, adapter)
        parts[str(written.relative_to(target))] = sha256(written)
    metadata = _metadata(prepared, folder, adapter, parts)
    config = replace(plan.spec, widths=tuple(point.width for point in metadata.points), units=plan.spec.units).config()
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


def write_gguf_file(prepared: Prepared, folder: RunFolder, ids: Tensor, logits: Tensor) -> float:
    """Write the finished checkpoint as a GGUF file too, read back before it counts; return the difference of logits.

    Of a checkpoint in block types, only that file, compress.json and the card are left.
    """
    from compress.checkpoints.gguf import verify_gguf, write_gguf

    spec, target, name = prepared.plan.spec, folder.checkpoint, prepared.job.out.name
    file = target / f"{name}.gguf"
    if not spec.is_gguf:
        write_gguf(target, file, name=name)
        return verify_gguf(target, file, ids, logits)
    metadata = read_metadata(target)
    types = {path: str(storage.block_type) for path, storage in spec.storage.items()}
    file_type = file_type_of(str(spec.gguf_type), types)
    write_gguf(target, file, name=metadata.name, types=types, file_type=file_type)
    difference = verify_gguf(target, file, ids, logits)
    metadata = metadata.model_copy(update={"parts": {file.name: sha256(file)}})
    clear(target, kept={file.name})
    metadata.write(target)
    write_card(target, metadata)
    if metadata.trials:
        write_trials(target, metadata.trials)
    return difference


def trials_of(folder: RunFolder) -> list[dict[str, Any]]:
    return [finding.data for name, finding in folder.findings.items() if name.startswith(TRIAL)]


def write_trials(folder: Path, trials: Iterable[Mapping[str, Any]]) -> None:
    """A line of JSON for each."""
    (folder / TRIALS).write_text("".join(f"{json.dumps(trial)}\n" for trial in trials), encoding="utf-8")


def decided_recipe(prepared: Prepared) -> Recipe:
    """The recipe with what the budget has come to in its stages: it makes the same bytes without another search."""
    return prepared.job.recipe.model_copy(update={"stages": prepared.plan.stages, "budget": None})


def mixture_of(plan: Plan) -> list[dict[str, Any]]:
    """How many of the matrices of each kind have which type in a GGUF file, and the bytes of the kind."""
    if not plan.spec.is_gguf:
        return []
    dense, dtype = replace(plan.spec, storage={}), plan.spec.dtype
    rows = {linear.path: (linear.m, linear.n) for linear in dense.written_linears}
    rows |= {path: (dense.config().vocab_size, width) for path, width in dense.tables}
    found = dict[str, dict[str, Any]]()
    for path, (m, n) in rows.items():
        stored, kind = plan.spec.storage.get(path), path.rpartition(".")[2]
        name = str(dtype).removeprefix("torch.") if stored is None else str(stored.block_type)
        part = found.setdefault(kind, {"part": kind, "types": {}, "bytes": 0})
        part["types"][name] = part["types"].get(name, 0) + 1
        part["bytes"] += m * (n * min(4, dtype.itemsize) if stored is None else row_bytes(name, n))
    return [*found.values()]


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
            "name": job.output_name,
            "base_model": job.model.repository or job.model.name,
            "command": job.command,
            "recipe": run["recipe"] if prepared.types is None else decided_recipe(prepared).model_dump(mode="json"),
            "architecture": plan.spec.architecture.class_name,
            "loads_without_our_code": plan.spec.architecture.is_stock,
            "stages": [stage.model_dump(mode="json") for stage in plan.stages],
            "trials": trials_of(folder),
            "versions": run["versions"],
            "origin": read_origin(prepared.folder),
            "export": job.export,
            "device": job.device.type,
            "batch_size": run["batch size"],
            "fingerprints": {key: run[key] for key in ("model", "calibration text")},
            "itemsize": prepared.written.itemsize,
            "dense_size": vars(plan.dense),
            "size": {
                "parameters": sum(report["parameters"] for report in reports),
                "bytes": sum(report["tensor_bytes"] + report["adapter_bytes"] for report in reports),
            },
            "adapter": adapter,
            **storage_metadata(plan),
            "mixture": mixture_of(plan),
            "alternatives": [alternative.to_dict() for alternative in plan.alternatives],
            "units": {kind: n if isinstance(n, int) else list(n) for kind, n in plan.spec.units.items()},
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


@dataclass(frozen=True)
class Result:
    """
    seconds: by kind of work; `total` is the whole run's, imports left out.
    units: how many of each kind a block keeps. ranks: of the factorized linears, by path; of `num_blocks` blocks.
    alternatives: ways to store the same linears, this one first. lost: of the linears' outputs on the calibration text,
        the share of their energy that the stored ones do not give, the mean over linears; None where none is stored.
    divergence: from the dense model on held-out calibration windows, in nats a token, where it was measured.
    difference: of the reloaded logits, as a share of the largest. mixture: as `mixture_of` has it.
    """

    out: Path
    architecture: str
    is_stock: bool
    is_gguf: bool
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
    mixture: list[dict[str, Any]]

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
            "mixture": self.mixture,
            "notes": self.notes,
        }


def result_of(
    prepared: Prepared, metadata: Metadata, seconds: dict[str, float], difference: float | None, resumed: int
) -> Result:
    job, exported = prepared.job, list[str]()
    if job.export == "gguf" or metadata.storage == "gguf":
        from compress.checkpoints.gguf import reader_notes

        exported = reader_notes(job.out / f"{job.out.name}.gguf")
    lost = [linear.lost for linear in metadata.linears if linear.lost is not None]
    reports = [linear.to_dict() for linear in metadata.linears] or metadata.groups
    return Result(
        out=job.out,
        architecture=metadata.architecture,
        is_stock=metadata.loads_without_our_code,
        is_gguf=metadata.storage == "gguf",
        dense=prepared.plan.dense,
        size=Size(metadata.size.parameters, metadata.size.bytes),
        widths=[point.width for point in metadata.points],
        units={kind: tuple(n) if isinstance(n, list) else n for kind, n in metadata.units.items()},
        num_blocks=prepared.plan.spec.num_blocks,
        ranks={linear.linear: linear.rank for linear in metadata.linears if linear.rank is not None},
        alternatives=[each.to_dict() for each in metadata.alternatives],
        lost=sum(lost) / len(lost) if lost and metadata.alternatives else None,
        divergence=metadata.held_out_divergence,
        seconds=seconds,
        difference=difference,
        resumed_parts=resumed,
        notes=[
            *prepared.plan.notes,
            *depth_notes(prepared.plan),
            *short_of_tokens(reports),
            *exported,
            *proof_notes(job.out),
        ],
        mixture=[part.to_dict() for part in metadata.mixture],
    )


def depth_notes(plan: Plan) -> list[str]:
    dropped = sorted(block for stage in plan.stages for block in stage.dropped)
    return [f"Blocks left out, counted from 0: {', '.join(map(str, dropped))}."] if dropped else []


def proof_notes(out: Path) -> list[str]:
    reason = why_own(out)
    return [] if reason is None else [f"Reloaded by this package's own reader, not by transformers: {reason}."]
