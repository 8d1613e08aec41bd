"""What a `slim` stage may be told of its three parts: how weights are pruned, quantized and corrected."""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator, model_validator

from compress.architectures.gguf_types import AUTO, FileType
from compress.architectures.packed_types import Engine
from compress.calibration.linears import LinearShape
from compress.numerics.decomposition import Pruner
from compress.numerics.grids import BLOCK, FLOAT4_STEPS, Granularity, IntegerType
from compress.numerics.lowrank import AdapterMethod
from compress.numerics.sparsity import Pattern
from compress.stages._stage import Strict


class Prune(Strict):
    """
    method: `magnitude`, `wanda`, `sparsegpt` or `admm`. pattern: 2:4 and its like, or the share deleted, 50%.
    iterations: of ADMM, whose penalty grows every 8.
    """

    method: Pruner = "admm"
    pattern: str = "2:4"
    iterations: Annotated[int, Field(ge=1)] = 48

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, value: str) -> str:
        Pattern.parse(value)
        return value

    @property
    def parsed(self) -> Pattern:
        return Pattern.parse(self.pattern)


class Quantize(Strict):
    """
    method: `absmax`, `slim` and `mse` round to nearest, `gptq` sweeps on the grid of `mse`.
    bits: of integers, or of floats with `floating`: 8 (fp8), or 4 in groups of 16 (NVFP4) or 32 (MXFP4).
    group: what shares a scale: `tensor`, `channel`, so many inputs, or, of fp8, `128x128`, those of so many rows; by
        default 128, or a channel where the linears' inputs are no multiples of that.
    gguf_type: of a GGUF file, such as Q4_K_M, in place of bits and group; with types by tensor Q4_K_M,ffn_down=Q6_K;
        or `auto`, types found under the recipe's budget.
    types: of each linear, by its path: a GGUF file's, settled when the model is known or given beside `auto`; or
        integers such as int4-g128 in place of bits and group, by patterns as `target` has them too, of which the last
        that fits counts. Linears without one stay as they are.
    engine: `vllm` or `transformers`: types are integers that it runs, found under the recipe's budget if not given.
    act_order: gptq takes inputs by decreasing activation. important_inputs: SLiM-Quant^O, which rounds one input in
        a hundred twice as finely.
    """

    method: Literal["absmax", "slim", "mse", "gptq"] = "gptq"
    bits: Annotated[int, Field(ge=2, le=8)] = 4
    floating: bool = False
    group: int | str | None = None
    gguf_type: str | None = None
    types: Mapping[str, str] | None = None
    engine: Engine | None = None
    symmetric: bool = True
    act_order: bool = False
    important_inputs: bool = False

    @field_validator("group")
    @classmethod
    def _known_group(cls, value: int | str | None) -> int | str | None:
        if value in (None, "tensor", "channel", BLOCK) or (isinstance(value, int) and value >= 2):
            return value
        raise ValueError(f"group is tensor, channel, {BLOCK} or 2 inputs at least, got {value!r}")

    @field_validator("gguf_type")
    @classmethod
    def _known_type(cls, value: str | None) -> str | None:
        if value not in (None, AUTO):
            FileType.parse(value)
        return value

    @property
    def granularity(self) -> Granularity:
        """What shares a step; a channel where that is still open."""
        if self.group == BLOCK:
            return BLOCK
        return self.group if isinstance(self.group, int) else "tensor" if self.group == "tensor" else "channel"

    @property
    def precision(self) -> int | str:
        """As the command says it: bits of integers, `fp8`, `nvfp4` or `mxfp4`."""
        if not self.floating:
            return self.bits
        return "fp8" if self.bits == 8 else "nvfp4" if self.group == 16 else "mxfp4"

    @property
    def is_open(self) -> bool:
        """Whether types are to be found."""
        return self.types is None and (self.engine is not None or self.gguf_type == AUTO)

    @property
    def step_dtype(self) -> torch.dtype | None:
        """What the format has steps in; None where it is the model's dtype."""
        return FLOAT4_STEPS[self.group] if self.floating and self.bits == 4 else None  # type: ignore[index]

    @model_validator(mode="after")
    def _fitting_types(self) -> "Quantize":
        if self.gguf_type is None:
            for name in (self.types or {}).values():
                IntegerType.parse(name)
        if self.engine is not None and self.gguf_type is not None:
            raise ValueError(f"{self.engine} runs no GGUF file; leave engine or gguf_type out")
        if self.gguf_type is None and (self.engine or self.types) and not self.symmetric:
            raise ValueError("types of integers are symmetric; leave asymmetric out")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> "Quantize":
        if self.floating and self.bits != 8 and (self.bits != 4 or self.group not in FLOAT4_STEPS):
            raise ValueError("floats have 8 bits (fp8), or 4 in groups of 16 (nvfp4) or 32 (mxfp4); take one of these")
        if self.group == BLOCK and not self.floating:
            raise ValueError(f"group {BLOCK} is of fp8 weights; take --bits fp8, or another group")
        if self.floating and (not self.symmetric or self.method == "slim"):
            raise ValueError(f"{self.precision} is symmetric, by absmax, mse or gptq; leave the others out")
        if self.act_order and self.method != "gptq":
            raise ValueError(f"act_order is of method gptq, not of {self.method}")
        if self.method == "slim" and not self.symmetric:
            raise ValueError("slim looks for symmetric grids; take absmax, mse or gptq")
        if self.important_inputs and not self.symmetric:
            raise ValueError("important_inputs goes with symmetric grids")
        return self


class Adapt(Strict):
    """
    rank: a share of min(m, n), or a number. rounds: how often adapter and weights are fitted to one another.
    bits, group: of the adapter's own codes; by default it keeps the model's dtype.
    """

    method: AdapterMethod = "whitened"
    rank: float | int = 0.1
    rounds: Annotated[int, Field(ge=1)] = 1
    bits: Annotated[int, Field(ge=2, le=8)] | None = None
    group: Annotated[int, Field(ge=2)] = 128

    @field_validator("rank")
    @classmethod
    def _share_or_number(cls, value: float | int) -> float | int:
        if value <= 0:
            raise ValueError(f"a rank is a share of the full one above 0, or a whole number; got {value}")
        if isinstance(value, float) and value > 1:
            if not value.is_integer():
                raise ValueError(f"a rank is a share of the full one below 1, or a whole number; got {value}")
            return int(value)
        return value

    def rank_of(self, linear: LinearShape) -> int:
        wanted = self.rank if isinstance(self.rank, int) else int(self.rank * linear.full_rank)
        return max(1, min(wanted, linear.full_rank))
