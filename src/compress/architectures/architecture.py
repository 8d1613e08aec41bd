"""Models described by their sizes alone, and the architectures that they are written in.

A plan applies the recipe to a `ModelSpec`, a walk applies it to weights. `Stock` is a class of transformers: the dense
model's own as it is, or narrower. `Own` is our class, for what no stock class can hold. Both can have packed linears.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.calibration.linears import FactorShape, LinearShape
from compress.calibration.sites import Count, StreamPoint, stream_points
from compress.calibration.walk import written_dtype
from compress.calibration.weights import Layout
from compress.errors import UsageError
from compress.families import Family
from compress.models.loading import empty_model, with_blocks
from compress.models.packing import embeddings_not_for_vllm, put_packed, quantization_config
from compress.models.storage import Storage, empty_linear, num_parameters
from compress.own_model.modeling_compress import unfuse_experts

# A safetensors header says a tensor's name, dtype, shape and place: what that takes beside the name, at most.
HEADER_BYTES_PER_TENSOR = 128
HEADER_BYTES_PER_FILE = 128


@dataclass(frozen=True)
class Size:
    """Parameters as they are stored (a tied head counts once), and bytes of all stored tensors."""

    parameters: int
    bytes: int


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, a tied one once, and persistent buffers."""
    saved = model.state_dict(keep_vars=True).keys()
    return dict(model.named_parameters()) | {name: each for name, each in model.named_buffers() if name in saved}


def stored_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Count the bytes of a model as it is written, most floats in `dtype`."""
    tensors = saved_tensors(model).items()
    return sum(each.numel() * written_dtype(name, each, dtype).itemsize for name, each in tensors)


def stored_parameters(model: nn.Module, _dtype: torch.dtype) -> int:
    return num_parameters(model)


@functools.cache
def tensor_bytes(storage: Storage, m: int, n: int, dtype: torch.dtype) -> Mapping[str, int]:
    """Bytes of what a linear without a bias is stored as, by tensor."""
    with torch.device("meta"):
        tensors = saved_tensors(empty_linear(storage, n, m, bias=False, dtype=dtype)).items()
    return {name: each.numel() * written_dtype(name, each, dtype).itemsize for name, each in tensors}


def header_bytes(name: str) -> int:
    return len(name) + HEADER_BYTES_PER_TENSOR


def disk_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Upper bound on the bytes of the safetensors files, headers included, one file a part."""
    headers = sum(header_bytes(name) for name in saved_tensors(model))
    files = model.config.get_text_config().num_hidden_layers + 2
    return stored_bytes(model, dtype) + headers + files * HEADER_BYTES_PER_FILE


Measure = Callable[[PreTrainedModel, torch.dtype], int]
SHALLOW: dict[tuple[Measure, torch.dtype, str], int] = {}  # measures of models of one and two blocks, by their config


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Describe a model before any weight is read. Stages derive new ones by `dataclasses.replace`.

    architecture: what it is written as. dtype: of the written weights.
    widths: of the stream after the embeddings and after each branch; None where the calibration data decides.
    units: how many of each kind in every block, or block by block.
    factors: what linears have become, by path. storage: how linears are stored, by path.
    gguf_type: of the one GGUF file that is written in place of a folder, as `FileType` reads it.
    undecided: what a budget or the survey has yet to decide: `hidden`, a kind of unit, `ranks` or `types`.
    notes: what the user should know of it.
    """

    architecture: "Architecture"
    dtype: torch.dtype
    widths: tuple[int | None, ...]
    units: Mapping[str, Count]
    factors: Mapping[str, FactorShape] = field(default_factory=dict)
    storage: Mapping[str, Storage] = field(default_factory=dict)
    gguf_type: str | None = None
    undecided: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    @classmethod
    def dense(cls, architecture: "Architecture", dtype: torch.dtype) -> "ModelSpec":
        """The dense model, to be written as `architecture`."""
        config, family = architecture.dense, architecture.family
        points = 1 + config.num_hidden_layers * len(family.branches)
        widths = (config.hidden_size,) * points
        return cls(architecture=architecture, dtype=dtype, widths=widths, units=family.dense_units(config))

    @property
    def num_blocks(self) -> int:
        return int(self.architecture.dense.num_hidden_layers)

    @property
    def dense_width(self) -> int:
        return int(self.architecture.dense.hidden_size)

    @property
    def stream_widths(self) -> tuple[int, ...]:
        """The widths, the dense one where the data decides."""
        return tuple(width or self.dense_width for width in self.widths)

    @cached_property
    def points(self) -> list[StreamPoint]:
        """The points of the dense stream that `widths` are of."""
        names = [branch.name for branch in self.architecture.family.branches]
        return stream_points(self.dense_width, num_blocks=self.num_blocks, branch_names=names, seed=0)

    @property
    def dense_units(self) -> dict[str, int]:
        return self.architecture.family.dense_units(self.architecture.dense)

    @property
    def is_decided(self) -> bool:
        return not self.undecided and None not in self.widths

    @property
    def deletes_nothing(self) -> bool:
        """Whether the stream and the units are as in the dense model."""
        return all(width == self.dense_width for width in self.widths) and self.units == self.dense_units

    def require_decided(self, message: str) -> None:
        """Raise UsageError with `message` where sizes are still open, or with what the architecture has no room for."""
        if not self.is_decided:
            raise UsageError(message)
        if problems := self.problems():
            raise UsageError("\n".join(problems))

    def problems(self) -> list[str]:
        return self.architecture.problems(self)

    @property
    def packed(self) -> dict[str, Storage]:
        """The linears and tables that engines' formats store: compressed-tensors, PEFT and GGUF."""
        return {path: storage for path, storage in self.storage.items() if storage.form in ("packed", "gguf")}

    @property
    def packed_tables(self) -> list[str]:
        """The embeddings' table and the head, by path, as far as compressed-tensors stores them in few bits."""
        family = self.architecture.family
        return [] if self.is_gguf else [path for path in (*family.embeddings, family.head) if path in self.packed]

    @property
    def packs_embeddings(self) -> bool:
        return bool(set(self.packed_tables) & set(self.architecture.family.embeddings))

    @property
    def tables_not_for_vllm(self) -> str | None:
        """Why vLLM does not load the embeddings as they are stored; None where it does."""
        if not self.packs_embeddings:
            return None
        is_tied = self.architecture.base_config(self, self.dtype).tie_word_embeddings
        return embeddings_not_for_vllm(self.packed[self.packed_tables[0]], is_tied=is_tied)

    @property
    def is_gguf(self) -> bool:
        return self.gguf_type is not None

    @cached_property
    def tables(self) -> list[tuple[str, int]]:
        """The paths of the embeddings' tables and of the head, where it is not tied; the length of their rows."""
        family, config, model = self.architecture.family, self.config(), self.model()
        paths = (*family.embeddings, *(() if config.tie_word_embeddings else (family.head,)))
        return [(path, model.get_submodule(path).get_parameter("weight").shape[1]) for path in paths]

    def model(self, *, num_blocks: int | None = None) -> PreTrainedModel:
        """Build it without weights, on the meta device; with fewer blocks, if asked."""
        config, packed = self.architecture.base_config(self, torch.float32), self.packed
        if num_blocks is not None:
            config = self.architecture.shortened(config, num_blocks)
        model, embeddings = unfuse_experts(empty_model(config)), self.architecture.family.embeddings
        put_packed(model, {path: how for path, how in packed.items() if path not in embeddings})
        model.tie_weights()
        if tables := {path: how for path, how in packed.items() if path in embeddings}:
            if config.tie_word_embeddings:
                model.set_submodule(self.architecture.family.head, nn.Identity())
            put_packed(model, tables)
        return model

    def config(self, dtype: torch.dtype | None = None) -> Any:
        config, packed = self.architecture.base_config(self, dtype or self.dtype), self.packed
        if any(storage.weights is not None for storage in packed.values()):
            family, kinds = self.architecture.family, (nn.Linear, nn.Embedding) if self.packs_embeddings else nn.Linear
            modules = replace(self, storage={}).model().named_modules()
            untouched = [name for name, module in modules if isinstance(module, kinds) and name not in packed]
            # vLLM's heads are no linears, and some of its embeddings have no name.
            tables = {path: "Embedding" if path in family.embeddings else path for path in self.packed_tables[::-1]}
            config.quantization_config = quantization_config(packed, untouched, tables)
        return config

    @cached_property
    def size(self) -> Size:
        return Size(self._count(stored_parameters), self._count(stored_bytes))

    @cached_property
    def disk_bytes(self) -> int:
        return self._count(disk_bytes)

    def _count(self, measure: Measure) -> int:
        """Measure the model: one of equal blocks by those of one and two blocks, exact, and much faster to build."""
        units_differ = any(isinstance(count, tuple) for count in self.units.values())
        if (
            self.architecture.family.others
            or units_differ
            or self.factors
            or self.storage
            or len(set(self.widths[:-1])) > 1
            or self.num_blocks == 1
        ):
            return measure(self.model(), self.dtype)
        one, two = (self._shallow(measure, depth) for depth in (1, 2))
        return one + (self.num_blocks - 1) * (two - one)

    def _shallow(self, measure: Measure, num_blocks: int) -> int:
        """Measure the model with `num_blocks` blocks, once for all specs that differ in depth alone."""
        config = self.architecture.shortened(self.architecture.base_config(self, torch.float32), num_blocks)
        key = (measure, self.dtype, config.to_json_string(use_diff=False))
        if key not in SHALLOW:
            SHALLOW[key] = measure(self.model(num_blocks=num_blocks), self.dtype)
        return SHALLOW[key]

    @cached_property
    def linears(self) -> list[LinearShape]:
        """The dense linears of the blocks that read and write the stream, as the walk has them."""
        architecture, found = self.architecture, []
        directions = architecture.layout(torch.float32).directions
        family, blocks = architecture.family, range(self.num_blocks)
        readers = {name for index in blocks for branch in family.branches_of(index) for name in branch.readers}
        plain = ModelSpec(architecture=architecture, dtype=self.dtype, widths=self.widths, units=self.units)
        for linear in plain.written_linears:
            m, n = linear.m, linear.n
            m, n = (m, directions(n)) if linear.name in readers else (directions(m), n)
            has_bias = linear.has_bias and linear.name not in architecture.zero_biases
            found.append(replace(linear, m=m, n=n, has_bias=has_bias))
        return found

    @cached_property
    def written_linears(self) -> list[LinearShape]:
        """The linears of the blocks as they are written, those of factors one by one."""
        model, family, found = self.model(), self.architecture.family, []
        for index in range(self.num_blocks):
            for name in (name for table in family.branches_of(index) for name in (*table.readers, *table.writers)):
                path = f"{family.blocks}.{index}.{name}"
                module, part = model.get_submodule(path), family.part_of(name)
                below = {"": module} if isinstance(module, nn.Linear) else dict(module.named_children())
                for suffix, linear in below.items():
                    assert isinstance(linear, nn.Linear)
                    ending = f".{suffix}" if suffix else ""
                    found.append(LinearShape.of(path + ending, name + ending, part, linear))
        return found


@dataclass(frozen=True)
class Architecture(ABC):
    """What a result is written as, and the config and layout of it. dense: the config of the dense model."""

    dense: Any
    family: Family

    is_stock: ClassVar[bool]  # whether transformers loads it without our code

    @property
    @abstractmethod
    def class_name(self) -> str: ...

    @property
    def zero_biases(self) -> tuple[str, ...]:
        """Linears of a block that have a bias in the class, of zeros, and none in the dense model."""
        return ()

    @abstractmethod
    def base_config(self, spec: ModelSpec, dtype: torch.dtype) -> Any:
        """Build the checkpoint's config, without a quantization config."""

    def shortened(self, config: Any, num_blocks: int) -> Any:
        """The config of the same model with fewer blocks; all blocks are alike."""
        return with_blocks(config, range(num_blocks))

    @abstractmethod
    def layout(self, dtype: torch.dtype) -> Layout:
        """The written form of the weights for an output dtype."""

    @abstractmethod
    def steps(self) -> Mapping[str, int]:
        """Multiples that widths of each kind, and ranks, are rounded to."""

    def not_for_vllm(self, _spec: ModelSpec) -> str | None:
        """Why vLLM does not run it, as far as that is known here; None where it does."""
        return None

    @abstractmethod
    def problems(self, spec: ModelSpec) -> list[str]:
        """Say why the architecture has no room for these sizes."""


ONE_WIDTH = "One basis for the whole stream has one width. Give one ratio for all blocks, or use --rotation per-layer."

# What kernels and group-wise quantization are made for: Marlin's K % 128, group size 128.
KERNEL_STEP = 128


def usual_step(width: int, divisor: int, *, at_least: int) -> int:
    """The largest power of two up to 128 (made divisible by `divisor`) of which `width` holds `at_least`.

    Where even a multiple of 1 is too coarse, that: `divisor` has to divide what is written.
    """
    step = KERNEL_STEP
    while step > 1 and math.lcm(step, divisor) * at_least > width:
        step //= 2
    return math.lcm(step, divisor)


def rank_step(config: Any) -> int:
    """Multiple that ranks are rounded to: 128 where the model is wide enough."""
    return usual_step(config.hidden_size, 1, at_least=32)
