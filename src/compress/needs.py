"""Memory and disk that a run takes, from config.json alone."""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch

from compress.checkpoints.targets import dense_units
from compress.families import Family
from compress.models.decoder import Decoder
from compress.recipe import Recipe
from compress.stages._stage import StageConfig, StoringStage
from compress.streaming.cache import cache_bytes
from compress.streaming.experts import lot_bytes
from compress.streaming.passage import has_linears, num_streams
from compress.streaming.spectra import WIDEST
from compress.streaming.survey import SurveyNeed, kept_streams


def needs(
    recipe: Recipe,
    stages: Sequence[StageConfig],
    config: Any,
    family: Family,
    *,
    computing: torch.dtype,
    cache_memory: int,
) -> tuple[int, int]:
    """Bytes of memory, and of disk beside the output."""
    calibration, width = recipe.calibration, config.hidden_size
    one = cache_bytes(calibration.samples, calibration.seq_len, width, computing)
    caches = one * num_streams(stages)
    if SurveyNeed.GRADIENT in surveyed(stages):
        caches = max(caches, one * kept_streams(config.num_hidden_layers, one, cache_memory))
    # Eigenvectors and their like take four matrices of the stream's width; a group of linears has its equations twice.
    statistics = 4 * width**2
    if has_linears(stages):
        # The stream itself is among the inputs of writers where their basis may change.
        beside = width if any(stage.reshapes for stage in stages) else 0
        inputs = beside + max(dense_units(config, family).get("neurons", 0), width)
        statistics = max(statistics, 4 * inputs * (inputs + width)) + expert_statistics(config, family)
    memory = largest_part(config, family) * (computing.itemsize + 8) + statistics * 8 + min(caches, cache_memory)
    if any(isinstance(stage, StoringStage) for stage in stages):
        memory += largest_linear(config, family) * (8 * 8 + 12 * computing.itemsize)
    spilled = caches if caches > cache_memory else 0
    return memory, 2 * one * num_streams(stages) + spilled + gradient_files(stages, config, family)


def expert_statistics(config: Any, family: Family) -> int:
    """Numbers in the second moments of all experts' inputs, and in the equations of those that are fitted together."""
    width, inner = config.hidden_size, dense_units(config, family).get("neurons", 0)
    experts = max(len(branch.experts) for branch in family.branches)
    return experts * (width**2 + inner**2) + lot_bytes(experts, inner, width) // 8 if experts else 0


def surveyed(stages: Sequence[StageConfig]) -> SurveyNeed:
    return functools.reduce(operator.or_, (stage.survey for stage in stages))


def gradient_files(stages: Sequence[StageConfig], config: Any, family: Family) -> int:
    """Bytes of the moments of gradients by linears' outputs, in float32."""
    if SurveyNeed.LINEARS | SurveyNeed.GRADIENT not in surveyed(stages):
        return 0
    decoder = Decoder(config, family, dtype=torch.float32, device=torch.device("cpu"))
    widest, shapes = WIDEST * config.hidden_size, decoder.parameter_shapes()
    outputs = [shapes[name][0] for name in decoder.block_names(0) if len(shapes[name]) > 1]
    return 4 * config.num_hidden_layers * sum(m * m if m <= widest else m for m in outputs)


def largest_linear(config: Any, family: Family) -> int:
    """Weights of the largest linear of a block. Sweeps and ADMM hold it a dozen times."""
    decoder = Decoder(config, family, dtype=torch.float32, device=torch.device("cpu"))
    shapes = decoder.parameter_shapes()
    return max(shapes[name].numel() for name in decoder.block_names(0))


def largest_part(config: Any, family: Family) -> int:
    """Parameters of the largest of embeddings, block and head, before compression."""
    decoder = Decoder(config, family, dtype=torch.float32, device=torch.device("cpu"))
    shapes = decoder.parameter_shapes()
    parts = [decoder.embedding_names(), decoder.block_names(0), decoder.head_names()]
    return max(sum(shapes[name].numel() for name in part) for part in parts)
