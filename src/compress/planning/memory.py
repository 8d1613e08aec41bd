"""Estimate a run's memory and disk from config.json alone; choose batch and cache sizes for a limit.

Memory is what a process holds and the system cannot take back: pages of files do not count. What is held at once are a
part's weights twice (as they are read or written and as they are computed with), the matrices of the widest thing that
is solved, what passes a block with a batch, and the activations between blocks as far as they may stay in memory. The
parts of a run come one after another, so what counts is the one that takes most.
"""

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from compress.architectures.architecture import dense_units
from compress.calibration.experts import lot_bytes
from compress.calibration.sites import (
    WholeModel,
    has_groups,
    has_linears,
    keeps_before_post_norms,
    num_streams,
    rotates_points,
)
from compress.calibration.spectra import WIDEST
from compress.calibration.streams import LOGITS_AT_ONCE, cache_bytes
from compress.calibration.survey import TOKENS_AT_ONCE, SurveyNeed, survey_samples
from compress.errors import UsageError
from compress.families import Family
from compress.models.decoder import Decoder
from compress.numerics.sums import ROWS_AT_ONCE
from compress.recipe import Recipe
from compress.stages._stage import StageConfig

TOKENS_PER_BATCH = 8192
DOUBLE = 8  # bytes of a float64
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Room:
    """Windows per batch, and bytes of activations that stay in memory."""

    batch_size: int
    cache_memory: int


def usual_batch_size(recipe: Recipe) -> int:
    calibration = recipe.calibration
    return max(1, min(TOKENS_PER_BATCH // calibration.seq_len, calibration.samples))


def needs(
    recipe: Recipe, stages: Sequence[StageConfig], config: Any, family: Family, *, computing: torch.dtype, room: Room
) -> tuple[int, int]:
    """Bytes of memory, without the interpreter and its libraries, and of disk, without the output."""
    calibration, sizes = recipe.calibration, Sizes.of(config, family, computing)
    one = cache_bytes(calibration.samples, calibration.seq_len, config.hidden_size, computing)
    caches = one * (num_streams(stages) + keeps_before_post_norms(stages, family))
    if SurveyNeed.GRADIENT in surveyed(stages):
        windows = survey_samples(calibration.samples, calibration.seq_len, config.hidden_size)
        caches = max(caches, one * windows // calibration.samples * (config.num_hidden_layers + 1))
    tokens = min(room.batch_size, calibration.samples) * calibration.seq_len
    weights = 2 * sizes.part * sizes.itemsize
    if has_linears(stages):
        weights += expert_statistics(config, family)
    memory = weights + max(
        forward_bytes(stages, sizes, tokens) + statistics_bytes(stages, sizes),
        solver_bytes(stages, sizes),
        logits_bytes(stages, sizes, room.batch_size),
    )
    spilled = caches if caches > room.cache_memory else 0
    disk = 2 * one * num_streams(stages) + spilled + gradient_files(stages, sizes)
    return memory + min(caches, room.cache_memory), disk


@dataclass(frozen=True)
class Sizes:
    """Sizes of a dense model in numbers: its largest part, matrix and linear of a block, and its widths.

    linears: outputs and inputs of those of a block. itemsize: bytes of a number that is computed with.
    """

    itemsize: int
    part: int
    matrix: int
    linears: Mapping[str, tuple[int, int]]
    width: int
    neurons: int
    vocabulary: int
    blocks: int

    @classmethod
    def of(cls, config: Any, family: Family, computing: torch.dtype) -> "Sizes":
        decoder = Decoder(config, family, dtype=torch.float32, device=torch.device("cpu"))
        shapes, block = decoder.parameter_shapes(), decoder.block_names(0)
        parts = [decoder.embedding_names(), block, decoder.head_names()]
        return cls(
            itemsize=computing.itemsize,
            part=max(sum(shapes[name].numel() for name in part) for part in parts),
            matrix=max(shapes[name].numel() for part in parts for name in part),
            linears={name: (shapes[name][0], shapes[name][1]) for name in block if len(shapes[name]) == 2},
            width=config.hidden_size,
            neurons=max(dense_units(config, family).get("neurons", 0), config.hidden_size),
            vocabulary=config.vocab_size,
            blocks=config.num_hidden_layers,
        )

    @property
    def linear(self) -> int:
        return max(m * n for m, n in self.linears.values())


def inputs_at_once(stages: Sequence[StageConfig], sizes: Sizes) -> int:
    """Number of inputs of the widest group of linears; writers also read the stream where each point is rotated."""
    shares_frame = any(stage.site is WholeModel for stage in stages)
    return sizes.neurons + (sizes.width if rotates_points(stages) and not shares_frame else 0)


def forward_bytes(stages: Sequence[StageConfig], sizes: Sizes, tokens: int) -> int:
    """Bytes of a batch in a block: activations and the operands of their sums."""
    activations = 8 * sizes.width + 4 * sizes.neurons
    if SurveyNeed.GRADIENT in surveyed(stages):
        activations *= 2  # what the pass backward needs of the pass forward
    summed = 3 * sizes.width + (3 * inputs_at_once(stages, sizes) if has_linears(stages) else 0)
    return tokens * (activations + summed) * sizes.itemsize


def statistics_bytes(stages: Sequence[StageConfig], sizes: Sizes) -> int:
    """Bytes of running sums: at a point of the stream, of a group of linears, or of a block's linears."""
    k, D = inputs_at_once(stages, sizes), sizes.width
    found = [D**2]
    if has_groups(stages):
        found.append(2 * k * (k + D))  # to fit on and held out
    elif has_linears(stages):
        found.append(k**2 + D**2)
    if SurveyNeed.STREAM in surveyed(stages):
        found.append(2 * D**2)
    if SurveyNeed.LINEARS in surveyed(stages):
        gradients = gradient_moments(sizes) if SurveyNeed.GRADIENT in surveyed(stages) else 0
        found.append(k**2 + 2 * D**2 + gradients)
    return max(found) * DOUBLE + ROWS_AT_ONCE * k * (sizes.itemsize + DOUBLE)


def solver_bytes(stages: Sequence[StageConfig], sizes: Sizes) -> int:
    """Bytes of eigensolves and regressions, and of weights in float64 while they are rotated."""
    k, D = inputs_at_once(stages, sizes), sizes.width
    statistics = 6 * D**2
    if has_groups(stages):
        statistics = max(statistics, 6 * k * (k + D))
    elif has_linears(stages):
        statistics = max(statistics, 6 * k**2)
    turned = sizes.matrix * (2 * DOUBLE + sizes.itemsize)
    if any(stage.in_written_form for stage in stages):
        # Sweeps and ADMM hold a linear a dozen times.
        turned = max(turned, sizes.linear * (8 * DOUBLE + 12 * sizes.itemsize))
    return statistics * DOUBLE + turned


def logits_bytes(stages: Sequence[StageConfig], sizes: Sizes, batch_size: int) -> int:
    """Bytes of logits and of what is computed from them."""
    held_out = LOGITS_AT_ONCE if any(stage.requires.held_out for stage in stages) else 0
    backward = TOKENS_AT_ONCE * batch_size if SurveyNeed.GRADIENT in surveyed(stages) else 0
    return sizes.vocabulary * max(held_out * 8, backward * 4) * sizes.itemsize


def expert_statistics(config: Any, family: Family) -> int:
    """Bytes of the second moments of all experts' inputs, and of the equations of those that are fitted together."""
    width, inner = config.hidden_size, dense_units(config, family).get("neurons", 0)
    experts = max(len(branch.experts) for branch in family.branches)
    return DOUBLE * experts * (width**2 + inner**2) + lot_bytes(experts, inner, width) if experts else 0


def surveyed(stages: Sequence[StageConfig]) -> SurveyNeed:
    return functools.reduce(operator.or_, (stage.requires.survey for stage in stages))


def gradient_moments(sizes: Sizes) -> int:
    """Numbers of the second moments of gradients by the outputs of a block's linears."""
    return sum(m * m if m <= WIDEST * sizes.width else m for m, _ in sizes.linears.values())


def gradient_files(stages: Sequence[StageConfig], sizes: Sizes) -> int:
    """Bytes of the gradient moments of all blocks, in float32."""
    if SurveyNeed.LINEARS | SurveyNeed.GRADIENT not in surveyed(stages):
        return 0
    return 4 * sizes.blocks * gradient_moments(sizes)


def largest_part_bytes(config: Any, family: Family, computing: torch.dtype) -> int:
    sizes = Sizes.of(config, family, computing)
    return sizes.part * sizes.itemsize


def fit_to_limit(asked: Room, limit: int, base: int, need: Callable[[Room], int], *, fixed_batch: bool) -> Room:
    """Choose the largest batch that fits, halving the wanted one, then as much activation cache as is left.

    limit: bytes that may be taken, `base` of them are. need: bytes that a run takes beside. fixed_batch: the user said
    how many windows at a time. Raises UsageError with the least that would do.
    """
    batch_size = asked.batch_size
    while True:
        left = limit - base - need(Room(batch_size, 0))
        if left >= 0:
            return Room(batch_size, min(asked.cache_memory, left))
        if batch_size == 1 or fixed_batch:
            smaller = "a smaller --batch-size or a shorter --seq-len" if batch_size > 1 else "a shorter --seq-len"
            raise UsageError(
                f"--max-memory {limit / 1e9:g} GB cannot be kept: with all activations on disk and {batch_size} "
                f"windows at a time the run takes {minimum_gb(limit - left):.2f} GB. Allow that, or use {smaller}."
            )
        batch_size //= 2


def minimum_gb(needed: int) -> float:
    """Round up to 10 MB and add 10 MB, because no two starts of Python hold the same."""
    return (math.ceil(needed / 1e7) + 1) / 100


def resident_bytes() -> int:
    """Bytes that this process holds and the system cannot take back: pages of files do not count."""
    if STATUS.is_file():
        for line in STATUS.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)
