"""Write everything of a finished checkpoint but its parts: config, tokenizer, index, compress.json, card, adapter."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.architectures.gguf_types import FileType
from compress.architectures.packed import not_for_vllm, unpacks_while_loading
from compress.checkpoints import files
from compress.checkpoints.card import read_origin, write_card
from compress.checkpoints.files import adapter_config, write_adapter
from compress.checkpoints.metadata import Metadata, read_metadata
from compress.checkpoints.run_folder import RunFolder, clear
from compress.io import sha256
from compress.planning.plan import Plan
from compress.planning.prepare import Prepared
from compress.version import FORMAT

TRIAL = "trial "  # before the place of a choice: a trial's name among the findings


def write_companions(prepared: Prepared, folder: RunFolder) -> Metadata:
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


def turn_into_gguf(prepared: Prepared, folder: RunFolder, ids: Tensor, logits: Tensor, memory: int) -> float:
    """Write a checkpoint in block types as one GGUF file, read it back, and leave only that; the difference of logits.

    Of the folder stay the file, compress.json and the card.
    """
    from compress.checkpoints.gguf import verify_gguf, write_gguf

    plan, target, metadata = prepared.plan, folder.checkpoint, read_metadata(folder.checkpoint)
    file = target / f"{prepared.job.out.name}.gguf"
    types = {path: str(storage.block_type) for path, storage in plan.spec.storage.items()}
    file_type = FileType.parse(str(plan.spec.gguf_type)).name
    write_gguf(target, file, name=metadata.name, types=types, file_type=file_type)
    difference = verify_gguf(target, file, ids, logits, memory=memory)
    found = metadata.model_copy(update={"parts": {file.name: sha256(file)}})
    clear(target, kept={file.name})
    found.write(target)
    write_card(target, found)
    return difference


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
