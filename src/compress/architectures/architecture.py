"""An architecture that a result can be written in: its config for given sizes, its empty model, its steps.

`Stock` is a class of transformers: the dense model's own as it is, or narrower. `Own` is our class, for what no stock
class has room for. Both can have packed linears.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compress.architectures.packed import put_packed, quantization_config
from compress.families import Family
from compress.models.loading import empty_model
from compress.models.storage import Storage
from compress.own_model.modeling_compress import unfuse_experts
from compress.streaming.layout import Layout
from compress.streaming.linears import FactorShape, LinearShape, linear_shape
from compress.streaming.sites import Count


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

    @property
    def packed(self) -> dict[str, Storage]:
        """The linears that are stored as compressed-tensors and PEFT read them."""
        return {path: storage for path, storage in self.storage.items() if storage.form == "packed"}


@dataclass(frozen=True)
class Architecture(ABC):
    """
    dense: the config of the dense model.
    """

    dense: Any
    family: Family

    @property
    @abstractmethod
    def class_name(self) -> str: ...

    @property
    @abstractmethod
    def is_stock(self) -> bool:
        """Whether transformers loads it without our code."""

    @property
    def zero_biases(self) -> tuple[str, ...]:
        """Linears of a block that have a bias in the class, of zeros, and none in the dense model."""
        return ()

    def config(self, shape: Shape, dtype: torch.dtype) -> Any:
        """What the checkpoint's config.json says."""
        config, packed = self._config(shape, dtype), shape.packed
        storage = next(iter(packed.values()), None)
        if storage is not None and storage.bits is not None:
            modules = self.model(replace(shape, storage={})).named_modules()
            untouched = [name for name, module in modules if isinstance(module, nn.Linear) and name not in packed]
            config.quantization_config = quantization_config(storage, untouched)
        return config

    def model(self, shape: Shape, *, num_blocks: int | None = None) -> PreTrainedModel:
        """Without weights, on the meta device; with fewer blocks, if asked."""
        config = self._config(shape, torch.float32)
        model = unfuse_experts(empty_model(config if num_blocks is None else self._shortened(config, num_blocks)))
        put_packed(model, shape.packed)
        model.tie_weights()
        return model

    @abstractmethod
    def _config(self, shape: Shape, dtype: torch.dtype) -> Any:
        """Without what compressed-tensors is told of packed linears."""

    def _shortened(self, config: Any, num_blocks: int) -> Any:
        """The config of a model with fewer blocks; those of this one are alike."""
        return shortened(config, num_blocks)

    @abstractmethod
    def layout(self, dtype: torch.dtype) -> Layout:
        """The form of the weights for an output dtype."""

    @abstractmethod
    def steps(self) -> Mapping[str, int]:
        """Widths of each kind, and ranks, are multiples of these."""

    @abstractmethod
    def faults(self, shape: Shape) -> list[str]:
        """Why the architecture has no room for a shape, a sentence each."""


def dense_units(config: Any, family: Family) -> dict[str, int]:
    """How many units of each kind a block of the dense model has."""
    found: dict[str, int] = {}
    for branch in family.branches:
        found |= {units.kind: units.number(config) for units in branch.units}
    return found


def block_linears(target: Architecture, shape: Shape) -> list[LinearShape]:
    """The linears that read and write the stream in the blocks, as the walk has them: a target's form comes later."""
    family, layout, found = target.family, target.layout(torch.float32), []
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
