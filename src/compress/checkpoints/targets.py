"""The architectures a compressed model can be written in.

Stock where a stock class has room for the result, ours otherwise. A target knows its config for given widths, the form
of the finished weights, and the steps that widths come in.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from transformers import PreTrainedModel

from compress.families import Family
from compress.models.storage import Storage
from compress.streaming.layout import Layout
from compress.streaming.linears import FactorShape, LinearShape, linear_shape
from compress.streaming.sites import Count

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def special_tokens(config: Any) -> dict[str, Any]:
    """What a config that is put around another says of them again; CodeGen's has no pad_token_id."""
    return {name: getattr(config, name, None) for name in TOKENS}


@dataclass(frozen=True)
class Shape:
    """
    widths: of the stream after the embeddings and after each branch. units: how many of each kind.
    factors: what linears have become, by their paths. storage: how linears are stored, by theirs.
    """

    widths: tuple[int, ...]
    units: Mapping[str, Count]
    factors: Mapping[str, FactorShape] = field(default_factory=dict)
    storage: Mapping[str, Storage] = field(default_factory=dict)


@runtime_checkable
class Target(Protocol):
    """
    dense: the config of the dense model. architecture: the name of the class.
    is_stock: transformers loads it without our code. carried: modeling files the checkpoint takes along.
    """

    @property
    def dense(self) -> Any: ...

    @property
    def architecture(self) -> str: ...

    @property
    def is_stock(self) -> bool: ...

    @property
    def carried(self) -> tuple[str, ...]: ...

    @property
    def zero_biases(self) -> tuple[str, ...]:
        """Linears of a block that have a bias in the class, of zeros, and none in the dense model."""

    def config(self, shape: Shape, dtype: torch.dtype) -> Any: ...

    def model(self, shape: Shape, *, num_blocks: int | None = None) -> PreTrainedModel:
        """Without weights; with fewer blocks, if asked."""

    def layout(self, dtype: torch.dtype) -> Layout:
        """The form of the weights for an output dtype."""

    def steps(self) -> Mapping[str, int]:
        """Widths of each kind, and ranks, are multiples of these."""

    def faults(self, shape: Shape) -> list[str]:
        """Why the architecture has no room for a shape, a sentence each."""


def dense_units(config: Any, family: Family) -> dict[str, int]:
    """How many units of each kind a block of the dense model has."""
    found: dict[str, int] = {}
    for branch in family.branches:
        found |= {units.kind: units.number(config) for units in branch.units}
    return found


def block_linears(target: Target, shape: Shape, family: Family) -> list[LinearShape]:
    """The linears that read and write the stream in the blocks, as the walk has them: a target's form comes later."""
    layout, found = target.layout(torch.float32), []
    for index, block in enumerate(target.model(shape).get_submodule(family.blocks).children()):
        for branch in family.branches:
            for name in (*branch.readers, *branch.writers):
                linear = block.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                written = linear_shape(f"{family.blocks}.{index}.{name}", name, family.part_of(name), linear)
                m, n = written.m, written.n
                m, n = (m, layout.directions(n)) if name in branch.readers else (layout.directions(m), n)
                has_bias = written.has_bias and name not in target.zero_biases
                found.append(replace(written, m=m, n=n, has_bias=has_bias))
    return found


ONE_WIDTH = "One basis for the whole stream has one width. Give one ratio for all blocks, or use --rotation per-layer."

# What kernels and group-wise quantisation are made for: Marlin's K % 128, group size 128.
KERNEL_STEP = 128


def usual_step(width: int, divisor: int, *, at_least: int) -> int:
    """The largest power of two up to 128, times what `divisor` needs beyond it, of which `width` has `at_least`.

    Where even a multiple of 1 is too coarse, that: `divisor` has to divide what is written.
    """
    step = KERNEL_STEP
    while step > 1 and math.lcm(step, divisor) * at_least > width:
        step //= 2
    return math.lcm(step, divisor)


def rank_step(config: Any) -> int:
    """128 where the model is wide enough for that to be fine."""
    return usual_step(config.hidden_size, 1, at_least=32)


def shortened(config: Any, num_blocks: int) -> Any:
    """The config of the same model with fewer blocks."""
    short = copy.deepcopy(config)
    short.num_hidden_layers = num_blocks
    if getattr(short, "layer_types", None):
        short.layer_types = short.layer_types[:num_blocks]
    return short
