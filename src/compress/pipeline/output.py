"""What a run writes last, and what it has to say.

Everything of a finished checkpoint but its parts: config, tokenizer, index, compress.json, card, adapter, GGUF file.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.architectures import packed_types
from compress.architectures.architecture import Size, tensor_bytes
from compress.architectures.gguf_types import file_type_of
from compress.calibration.groups import short_of_tokens
from compress.calibration.sites import Count
from compress.checkpoints import files
from compress.checkpoints.card import read_origin, write_card
from compress.checkpoints.files import adapter_config, write_adapter
from compress.checkpoints.metadata import Metadata, read_metadata
from compress.checkpoints.run_folder import RunFolder, clear
from compress.checkpoints.verify import why_own
from compress.io import sha256
from compress.models.packing import unpacks_while_loading
from compress.numerics.grids import QuantizationArgs
from compress.planning.plan import Plan
from compress.planning.prepare import Prepared
from compress.stages.slim import Slim
from compress.version import FORMAT

TRIALS = "trials.jsonl"
TRIAL = "trial "  # before the place of a choice: a trial's name among the findings


def write_companions(prepared: Prepared, folder: RunFolder) -> Metadata:
    plan, target, reports = prepared.plan, folder.checkpoint, [part.report for part in folder.parts]
    parts = {part.weights.file: part.weights.sha256 for part in folder.parts if part.weights}
    adapter, ranks = None, {path: each.rank for path, each in plan.spec.packed.items() if each.rank}
    if ranks:
        modules = [name for name, _ in plan.spec.model().named_modules()]
        adapter = adapter_config(prepared.job.output_name, ranks, modules)
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
    if prepared.types is not None and metadata.trials:
        write_trials(target, metadata.trials)
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
    clear(target, kept={file.name, TRIALS})
    metadata.write(target)
    write_card(target, metadata)
    return difference


def trials_of(folder: RunFolder) -> list[dict[str, Any]]:
    return [finding.data for name, finding in folder.findings.items() if name.startswith(TRIAL)]


def write_trials(folder: Path, trials: Iterable[Mapping[str, Any]]) -> None:
    """A line of JSON for each."""
    (folder / TRIALS).write_text("".join(f"{json.dumps(trial)}\n" for trial in trials), encoding="utf-8")


def mixture_of(plan: Plan) -> list[dict[str, Any]]:
    """How many of the matrices of each kind have which type, and the bytes of the kind; nothing where all have one."""
    if not any(isinstance(stage, Slim) and stage.has_types for stage in plan.stages):
        return []
    dense, dtype = replace(plan.spec, storage={}), plan.spec.dtype
    rows = {linear.path: (linear.m, linear.n) for linear in dense.written_linears}
    rows |= {path: (dense.config().vocab_size, width) for path, width in dense.tables}
    found = dict[str, dict[str, Any]]()
    for path, (m, n) in rows.items():
        stored, kind = plan.spec.storage.get(path), path.rpartition(".")[2]
        name = str(dtype).removeprefix("torch.") if stored is None else stored.type_name
        part = found.setdefault(kind, {"part": kind, "types": {}, "bytes": 0})
        part["types"][name] = part["types"].get(name, 0) + 1
        tensors = {"weight": m * n * min(4, dtype.itemsize)} if stored is None else tensor_bytes(stored, m, n, dtype)
        part["bytes"] += sum(tensors.values())
    return [*found.values()]


def _metadata(prepared: Prepared, folder: RunFolder, adapter: dict[str, Any] | None, parts: dict[str, str]) -> Metadata:
    """Make compress.json. adapter: its config. parts: the sha256 of the files of weights."""
    job, plan = prepared.job, prepared.plan
    run, reports = folder.run.identity, [part.report for part in folder.parts]
    recipe = run["recipe"]
    if prepared.types is not None:  # with what the budget has come to: it makes the same bytes without another search
        decided = job.recipe.model_copy(update={"stages": plan.stages, "budget": None})
        recipe = decided.model_dump(mode="json")
    groups = [group for report in reports for group in report["groups"]]
    stored = [*dict.fromkeys(plan.spec.storage.values())]
    model_type = plan.spec.architecture.dense.model_type
    return Metadata.model_validate(
        {
            "format": FORMAT,
            "name": job.output_name,
            "base_model": job.model.repository or job.model.name,
            "command": job.command,
            "recipe": recipe,
            "architecture": plan.spec.architecture.class_name,
            "loads_without_our_code": plan.spec.architecture.is_stock,
            "stages": [stage.model_dump(mode="json") for stage in plan.stages],
            "trials": trials_of(folder),
            "dropped": sorted(block for stage in plan.stages for block in stage.dropped),
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
            "form": stored[0].form if stored else None,
            "quantized": any(each.weights is not None for each in stored),
            "unpacks_while_loading": plan.spec.packs_embeddings
            or any(unpacks_while_loading(each, model_type) for each in stored),
            "not_for_vllm": plan.spec.architecture.not_for_vllm(plan.spec)
            or packed_types.not_for_vllm(plan.spec)
            or plan.spec.tables_not_for_vllm,
            "mixture": mixture_of(plan),
            "alternatives": [alternative.to_dict() for alternative in plan.alternatives],
            "units": {kind: n if isinstance(n, int) else list(n) for kind, n in plan.spec.units.items()},
            "held_out_divergence": reports[-1]["divergence"],
            "points": [point for report in reports for point in report["points"]],
            "groups": [group for group in groups if "group" in group],
            "linears": [group for group in groups if "linear" in group],
            "tables": [
                {"linear": path, "bits": (plan.spec.storage[path].weights or QuantizationArgs()).num_bits}
                for path in plan.spec.packed_tables
            ],
            "parts": parts,
        }
    )


@dataclass(frozen=True)
class Result:
    """What a run has come to.

    metadata: what compress.json says. units: how many of each kind a block keeps. num_blocks: of the result.
    seconds: by kind of work; `total` is the whole run's, imports left out. difference: of the reloaded logits, as a
        share of the largest.
    """

    out: Path
    metadata: Metadata
    dense: Size
    size: Size
    units: dict[str, Count]
    num_blocks: int
    seconds: dict[str, float]
    difference: float | None
    resumed_parts: int
    notes: list[str]

    @property
    def widths(self) -> list[int]:
        return [point.width for point in self.metadata.points]

    @property
    def ranks(self) -> dict[str, int]:
        """Of the factorized linears, by path."""
        return {linear.linear: linear.rank for linear in self.metadata.linears if linear.rank is not None}

    @property
    def lost(self) -> float | None:
        """The share of the linears' outputs' energy that the stored ones do not give, the mean over linears."""
        lost = [linear.lost for linear in self.metadata.linears if linear.lost is not None]
        return sum(lost) / len(lost) if lost and self.metadata.alternatives else None

    def to_dict(self) -> dict[str, Any]:
        metadata = self.metadata
        return {
            "out": str(self.out),
            "architecture": metadata.architecture,
            "loads_without_our_code": metadata.loads_without_our_code,
            "dense_parameters": self.dense.parameters,
            "parameters": self.size.parameters,
            "removed": 1 - self.size.parameters / self.dense.parameters,
            "dense_bytes": self.dense.bytes,
            "bytes": self.size.bytes,
            "widths": self.widths,
            "units": self.units,
            "ranks": self.ranks,
            "alternatives": [each.to_dict() for each in metadata.alternatives],
            "lost_energy": self.lost,
            "held_out_divergence": metadata.held_out_divergence,
            "seconds": {kind: round(value, 3) for kind, value in self.seconds.items()},
            "reload_difference": self.difference,
            "resumed_parts": self.resumed_parts,
            "mixture": [part.to_dict() for part in metadata.mixture],
            "notes": self.notes,
        }


def result_of(
    prepared: Prepared, metadata: Metadata, seconds: dict[str, float], difference: float | None, resumed: int
) -> Result:
    job, plan, notes = prepared.job, prepared.plan, [*prepared.plan.notes]
    if metadata.dropped:
        notes.append(f"Blocks left out, counted from 0: {', '.join(map(str, metadata.dropped))}.")
    notes += short_of_tokens([linear.to_dict() for linear in metadata.linears] or metadata.groups)
    if job.export == "gguf" or metadata.form == "gguf":
        from compress.checkpoints.gguf import reader_notes

        notes += reader_notes(job.out / f"{job.out.name}.gguf")
    notes += proof_notes(job.out)
    size = Size(metadata.size.parameters, metadata.size.bytes)
    units = {kind: tuple(n) if isinstance(n, list) else n for kind, n in metadata.units.items()}
    counts = (plan.dense, size, units, plan.spec.num_blocks)
    return Result(job.out, metadata, *counts, seconds, difference, resumed, notes)


def proof_notes(out: Path) -> list[str]:
    reason = why_own(out)
    return [] if reason is None else [f"Reloaded by this package's own reader, not by transformers: {reason}."]
