"""Estimate a run's memory and disk from config.json alone; choose batch and cache sizes for a limit.

Memory is what a process holds and the system cannot take back: pages of files do not count. What is held at once are a
part's weights twice (as they are read or written and as they are computed with), the matrices of the widest thing that
is solved, what passes a block with a batch, and the activations between blocks as far as they may stay in memory. The
parts of a run come one after another, so what counts is the one that takes most.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from compress.calibration import sites
from compress.calibration.depth import Depth
from compress.calibration.groups import lot_bytes
from compress.calibration.observers import WIDEST
from compress.calibration.streams import LOGITS_AT_ONCE, cache_bytes
from compress.calibration.survey import TOKENS_AT_ONCE, SurveyNeed, survey_samples
from compress.errors import UsageError
from compress.families import Family
from compress.models.decoder import Decoder
from compress.numerics.sums import ROWS_AT_ONCE
from compress.recipe import Calibration, Recipe
from compress.stages._stage import StageConfig
from compress.stages.tables import ROWS

TOKENS_PER_BATCH = 8192
DOUBLE = 8  # bytes of a float64


@dataclass(frozen=True)
class Room:
    """Windows per batch, and bytes of activations that stay in memory."""

    batch_size: int
    cache_memory: int


def usual_batch_size(recipe: Recipe) -> int:
    calibration = recipe.calibration
    return max(1, min(TOKENS_PER_BATCH // calibration.seq_len, calibration.samples))


def surveyed(stages: Sequence[StageConfig]) -> SurveyNeed:
    return functools.reduce(operator.or_, (stage.requires.survey for stage in stages), SurveyNeed.NONE)


class Footprint:
    """Bytes that the walk and the survey of a model hold at once, by what they are doing.

    part, matrix: numbers of the largest of the model. linears: outputs and inputs of those of a block. itemsize: bytes
    of a number that is computed with. inner: neurons of an MLP or an expert. inputs: of the widest group of linears;
    writers also read the stream where each point is rotated.
    """

    def __init__(self, stages: Sequence[StageConfig], config: Any, family: Family, computing: torch.dtype) -> None:
        self.stages, self.computing, self.itemsize = stages, computing, computing.itemsize
        self.survey = surveyed(stages)
        self.has_gradient = SurveyNeed.GRADIENT in self.survey
        self.has_linears, self.has_groups = sites.has_linears(stages), sites.has_groups(stages)
        self.is_shallower = any(stage.site is Depth for stage in stages)
        self.num_streams, self.keeps_before = sites.num_streams(stages), sites.keeps_before_post_norms(stages, family)
        decoder = Decoder(config, family, dtype=torch.float32, device=torch.device("cpu"))
        shapes = decoder.parameter_shapes()
        blocks = [decoder.block_names(index) for index in (0, *family.others, config.num_hidden_layers - 1)]
        block = max(blocks, key=lambda names: sum(shapes[name].numel() for name in names))
        parts = [decoder.embedding_names(), block, decoder.head_names()]
        self.part = max(sum(shapes[name].numel() for name in part) for part in parts)
        self.matrix = max(shapes[name].numel() for part in parts for name in part)
        self.linears = [(shapes[name][0], shapes[name][1]) for name in block if len(shapes[name]) == 2]
        self.width, self.vocabulary, self.blocks = config.hidden_size, config.vocab_size, config.num_hidden_layers
        self.inner = family.dense_units(config).get("neurons", 0)
        self.experts = max(len(branch.experts) for branch in family.branches)
        self.neurons = max(self.inner, self.width)
        shares_frame = any(stage.site is sites.WholeModel for stage in stages)
        self.inputs = self.neurons + (self.width if sites.rotates_points(stages) and not shares_frame else 0)

    def needs(self, calibration: Calibration, room: Room) -> tuple[int, int]:
        """Bytes of memory, without the interpreter and its libraries, and of disk, without the output."""
        one = cache_bytes(calibration.samples, calibration.seq_len, self.width, self.computing)
        caches = one * (self.num_streams + self.keeps_before)
        if self.has_gradient:
            windows = survey_samples(calibration.samples, calibration.seq_len, self.width)
            caches = max(caches, one * windows // calibration.samples * (self.blocks + 1))
        tokens = min(room.batch_size, calibration.samples) * calibration.seq_len
        memory = self.weights() + max(
            self.forward(tokens) + self.statistics(), self.solver(), self.logits(room.batch_size)
        )
        spilled = caches if caches > room.cache_memory else 0
        disk = 2 * one * self.num_streams + spilled
        if SurveyNeed.LINEARS in self.survey and self.has_gradient:  # gradient moments of all blocks, in float32
            disk += 4 * self.blocks * self.gradient_moments()
        return memory + min(caches, room.cache_memory), disk

    def weights(self) -> int:
        """A part's weights, as they are stored and as they are computed with, and the statistics of its experts.

        These are second moments of all experts' inputs, and the equations of those that are fitted together. Where
        blocks are left out, one of them is loaded together with the block before it.
        """
        found = (2 + self.is_shallower) * self.part * self.itemsize
        if self.has_linears and self.experts:
            found += DOUBLE * self.experts * (self.width**2 + self.inner**2)
            found += lot_bytes(self.experts, self.inner, self.width)
        return found

    def forward(self, tokens: int) -> int:
        """A batch in a block: activations and the operands of their sums."""
        activations = 8 * self.width + 4 * self.neurons
        if self.has_gradient:
            activations *= 2  # what the pass backward needs of the pass forward
        summed = 3 * self.width + (3 * self.inputs if self.has_linears else 0)
        return tokens * (activations + summed) * self.itemsize

    def statistics(self) -> int:
        """Running sums: at a point of the stream, of a group of linears, or of a block's linears."""
        k, D = self.inputs, self.width
        found = [D**2]
        if self.has_groups:
            found.append(2 * k * (k + D))  # to fit on and held out
        elif self.has_linears:
            found.append(k**2 + D**2)
        if SurveyNeed.STREAM in self.survey:
            found.append(2 * D**2)
        if SurveyNeed.LINEARS in self.survey:
            found.append(k**2 + 2 * D**2 + (self.gradient_moments() if self.has_gradient else 0))
        return max(found) * DOUBLE + ROWS_AT_ONCE * k * (self.itemsize + DOUBLE)

    def solver(self) -> int:
        """Eigensolves and regressions, and weights in float64 while they are rotated."""
        k, D = self.inputs, self.width
        statistics = 6 * D**2
        if self.has_groups:
            statistics = max(statistics, 6 * k * (k + D))
        elif self.has_linears:
            statistics = max(statistics, 6 * k**2)
        turned = self.matrix * (2 * DOUBLE + self.itemsize)
        if any(stage.in_written_form for stage in self.stages):
            # Sweeps and ADMM hold a linear a dozen times.
            swept = max(m * n for m, n in self.linears)
            if any(stage.site is sites.Table for stage in self.stages):
                swept = max(swept, min(ROWS, self.vocabulary) * self.width)
            turned = max(turned, swept * (8 * DOUBLE + 12 * self.itemsize))
        return statistics * DOUBLE + turned

    def logits(self, batch_size: int) -> int:
        held_out = LOGITS_AT_ONCE if any(stage.requires.held_out for stage in self.stages) else 0
        backward = TOKENS_AT_ONCE * batch_size if self.has_gradient else 0
        return self.vocabulary * max(held_out * 8, backward * 4) * self.itemsize

    def gradient_moments(self) -> int:
        """Numbers of the second moments of gradients by the outputs of a block's linears."""
        return sum(m * m if m <= WIDEST * self.width else m for m, _ in self.linears)


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
            # Up to 10 MB and 10 MB more, because no two starts of Python hold the same.
            least = (math.ceil((limit - left) / 1e7) + 1) / 100
            smaller = "a smaller --batch-size or a shorter --seq-len" if batch_size > 1 else "a shorter --seq-len"
            raise UsageError(
                f"--max-memory {limit / 1e9:g} GB cannot be kept: with all activations on disk and {batch_size} "
                f"windows at a time the run takes {least:.2f} GB. Allow that, or use {smaller}."
            )
        batch_size //= 2


def resident_bytes() -> int:
    """Bytes that this process holds and the system cannot take back: pages of files do not count."""
    held = psutil.Process().memory_info()
    return int(held.rss - getattr(held, "shared", 0))
