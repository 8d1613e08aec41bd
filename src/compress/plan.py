"""What a recipe will do to a model, from its config.json alone: widths, parameters, bytes, memory, disk."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from compress.checkpoints.sliced import Size, dense_size, sliced_config, sliced_size
from compress.errors import UsageError
from compress.families import Family
from compress.models.decoder import Decoder
from compress.recipe import Recipe
from compress.streaming.cache import cache_bytes
from compress.streaming.sites import StreamPoint, stream_points
from compress.streaming.walk import num_streams


@dataclass(frozen=True)
class Plan:
    """
    widths: of the stream after the embeddings and after each branch; None where the data decides.
    sliced: the result's size; where the data decides, None.
    memory_bytes: the most that is held at once beside the interpreter: the largest part at its dense width with its
        float64 copy, its statistics, a batch in flight, and the activation cache as far as it may stay in memory.
    disk_bytes: the output, the state a killed run resumes from, twice while it is replaced, and activations that
        memory does not hold.
    """

    widths: list[int | None]
    dense: Size
    sliced: Size | None
    memory_bytes: int
    disk_bytes: int

    @property
    def removed(self) -> float | None:
        return None if self.sliced is None else 1 - self.sliced.parameters / self.dense.parameters

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "removed": self.removed}


def model_points(config: Any, family: Family, seed: int) -> list[StreamPoint]:
    names = [branch.name for branch in family.branches]
    blocks, width = config.num_hidden_layers, config.hidden_size
    return stream_points(width, num_blocks=blocks, branch_names=names, seed=seed)


def planned_widths(recipe: Recipe, points: list[StreamPoint]) -> list[int | None]:
    """Each point's width after all stages: the least that one plans, None if one leaves it to the data."""
    widths: list[int | None] = []
    for point in points:
        planned = [stage.planned_width(point) for stage in recipe.stages]
        known = [width for width in planned if width is not None]
        widths.append(min(known) if len(known) == len(planned) else None)
    return widths


def make_plan(
    recipe: Recipe, config: Any, family: Family, *, dtype: torch.dtype, computing: torch.dtype, cache_memory: int
) -> Plan:
    """Raises UsageError with what of the recipe does not fit the model."""
    points = model_points(config, family, recipe.seed)
    faults = [fault for stage in recipe.stages for fault in stage.faults(points)]
    if faults:
        raise UsageError("\n".join(faults))
    widths = planned_widths(recipe, points)
    if all(width == config.hidden_size for width in widths):
        raise UsageError("The recipe deletes nothing: every width stays as it is. Add a slice stage.")
    known = [width for width in widths if width is not None]
    dense = dense_size(config, dtype)
    sliced = sliced_size(sliced_config(config, family, known, dtype), dtype) if len(known) == len(widths) else None
    calibration = recipe.calibration
    cache = cache_bytes(calibration.samples, calibration.seq_len, config.hidden_size, computing)
    cache *= num_streams(recipe.stages)
    spilled = cache if cache > cache_memory else 0
    return Plan(
        widths=widths,
        dense=dense,
        sliced=sliced,
        memory_bytes=largest_part(config, family) * (computing.itemsize + 8)
        + 4 * config.hidden_size**2 * 8
        + min(cache, cache_memory),
        disk_bytes=(sliced or dense).bytes + 2 * cache + spilled,
    )


def largest_part(config: Any, family: Family) -> int:
    """Parameters of the largest of embeddings, block and head, before compression."""
    decoder = Decoder(config, family, dtype=torch.float32, device=torch.device("cpu"))
    shapes = decoder.parameter_shapes()
    parts = [decoder.embedding_names(), decoder.block_names(0), decoder.head_names()]
    return max(sum(shapes[name].numel() for name in part) for part in parts)
