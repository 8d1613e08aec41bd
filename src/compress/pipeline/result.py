"""What a finished run has to say."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.architectures.sizes import Size
from compress.calibration.experts import short_of_tokens
from compress.calibration.sites import Count
from compress.checkpoints.metadata import Metadata
from compress.checkpoints.verify import why_own
from compress.planning.prepare import Job, Prepared


@dataclass(frozen=True)
class Result:
    """
    seconds: by kind of work; `total` is the whole run's, imports left out.
    units: how many of each kind a block keeps. ranks: of the factorized linears, by path; of `num_blocks` blocks.
    alternatives: ways to store the same linears, this one first. lost: of the linears' outputs on the calibration text,
        the share of their energy that the stored ones do not give, the mean over linears; None where none is stored.
    divergence: from the dense model on held-out calibration windows, in nats a token, where it was measured.
    difference: of the reloaded logits, as a share of the largest.
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


def result_of(
    prepared: Prepared, metadata: Metadata, seconds: dict[str, float], difference: float | None, resumed: int
) -> Result:
    return Result(
        out=prepared.job.out,
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
