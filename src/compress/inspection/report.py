"""An inspection as plain data, for machines."""

from dataclasses import asdict
from typing import Any

from compress.inspection.linears import StoredLinear
from compress.inspection.summary import Inspection, block_rows


def as_data(seen: Inspection) -> dict[str, Any]:
    facts = seen.facts
    return {
        "folder": str(seen.folder),
        "made_by_compress": facts is not None,
        "verified": seen.verified,
        "architecture": architecture(seen),
        "quantized_by": seen.quantized_by,
        "parameters": seen.parameters,
        "bytes": seen.bytes,
        "bits_per_weight": seen.bits_per_weight,
        "dtypes": dtypes(seen),
        **({} if facts is None else origin(seen)),
        "quality": None if seen.quality is None else seen.quality.model_dump(),
        "blocks": [asdict(row) for row in block_rows(seen)],
        "linears": [linear_data(linear, seen) for linear in seen.linears],
    }


def architecture(seen: Inspection) -> str:
    found = seen.config.get("architectures")
    return str(found[0] if isinstance(found, list) and found else seen.config.get("model_type", "unknown"))


def origin(seen: Inspection) -> dict[str, Any]:
    assert seen.facts is not None
    said = (
        "base_model",
        "command",
        "loads_without_our_code",
        "storage",
        "not_for_vllm",
        "held_out_divergence",
        "tuning",
    )
    facts = seen.facts.model_dump()
    return {
        **{key: facts[key] for key in said},
        "method": seen.facts.recipe.method,
        "dense_size": facts["dense_size"],
        "versions": facts["versions"],
        "points": facts["points"],
        "alternatives": facts["alternatives"],
    }


def dtypes(seen: Inspection) -> dict[str, dict[str, int]]:
    """By the type of number: how many tensors have it, and their bytes."""
    found: dict[str, dict[str, int]] = {}
    for tensor in seen.tensors:
        entry = found.setdefault(tensor.dtype, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.bytes
    return found


def linear_data(linear: StoredLinear, seen: Inspection) -> dict[str, Any]:
    zeros = seen.zeros.get(linear.path)
    return {
        "linear": linear.path,
        "outputs": linear.m,
        "inputs": linear.n,
        "form": linear.form,
        "rank": linear.rank,
        "bits": linear.bits,
        "bits_per_weight": linear.bits_per_weight,
        "zeros": None if zeros is None else zeros.share,
        "pattern": None if zeros is None else zeros.pattern,
        "pattern_kept": None if zeros is None or zeros.pattern is None else zeros.kept,
        "lost": linear.facts.lost if linear.facts else None,
        "parameters": linear.parameters,
        "bytes": linear.bytes,
    }
