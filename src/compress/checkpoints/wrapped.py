"""Targets and layouts built around others: whatever they do not say themselves is their base's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from compress.checkpoints.targets import Shape, Target
from compress.models.branch import Branch
from compress.models.written import WrittenForm
from compress.streaming.layout import Layout

INNER = "model."  # what our architectures call the model that they are built around


@dataclass(frozen=True)
class WrappedTarget:
    """
    base: what the model would be written as otherwise.
    """

    base: Target

    @property
    def dense(self) -> Any:
        return self.base.dense

    @property
    def architecture(self) -> str:
        return self.base.architecture

    @property
    def is_stock(self) -> bool:
        return self.base.is_stock

    @property
    def carried(self) -> tuple[str, ...]:
        return self.base.carried

    @property
    def zero_biases(self) -> tuple[str, ...]:
        return self.base.zero_biases

    def config(self, shape: Shape, dtype: torch.dtype) -> Any:
        return self.base.config(shape, dtype)

    def model(self, shape: Shape, *, num_blocks: int | None = None) -> PreTrainedModel:
        return self.base.model(shape, num_blocks=num_blocks)

    def layout(self, dtype: torch.dtype) -> Layout:
        return self.base.layout(dtype)

    def steps(self) -> Mapping[str, int]:
        return self.base.steps()

    def faults(self, shape: Shape) -> list[str]:
        return self.base.faults(shape)


@dataclass(frozen=True)
class WrappedLayout:
    """
    prefix: before the names that the base gives.
    """

    base: Layout
    prefix: str = ""

    @property
    def ties_head(self) -> bool:
        return self.base.ties_head

    def directions(self, width: int) -> int:
        return self.base.directions(width)

    def form(self, branch: Branch, name: str) -> WrittenForm:
        return self.base.form(branch, name)

    def settle(self, branch: Branch) -> None:
        self.base.settle(branch)

    def written(self, name: str) -> str:
        return self.prefix + self.base.written(name)

    def file_name(self, name: str) -> str:
        return name if self.prefix else self.base.file_name(name)

    def in_adapter(self, name: str) -> str | None:
        return self.base.in_adapter(name)
