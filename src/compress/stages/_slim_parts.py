"""What a `slim` stage may be told of its three parts: how weights are pruned, quantized and corrected."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from compress.architectures.gguf_types import AUTO, FileType
from compress.architectures.packed_types import Engine
from compress.calibration.linears import LinearShape
from compress.numerics.decomposition import Pruner
from compress.numerics.grids import QuantizationArgs, Strategy
from compress.numerics.lowrank import AdapterMethod
from compress.numerics.sparsity import Pattern
from compress.stages._stage import Strict

USUAL_GROUP = 128  # inputs that share a scale: what engines' kernels are made for


class Prune(Strict):
    """How weights are pruned.

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


class Quantize(QuantizationArgs):
    """How weights are quantized.

    method: `absmax`, `slim` and `mse` round to nearest, `gptq` sweeps on the grid of `mse`.
    num_bits, type, symmetric, strategy, group_size: see `QuantizationArgs`. By default groups of 128, or channels where
        the linears' inputs are no multiples of that.
    gguf_type: of a GGUF file, such as Q4_K_M, in place of all these; with types by tensor Q4_K_M,ffn_down=Q6_K; or
        `auto`, types found under the recipe's budget.
    types: of each linear, by its path: a GGUF file's, settled when the model is known or given beside `auto`; or
        integers such as int4-g128 in place of num_bits and group_size, by patterns as `target` has them too, of which
        the last that fits counts. Linears without one stay as they are.
    engine: `vllm` or `transformers`: types are integers that it runs, found under the recipe's budget if not given.
    actorder: `weight`: gptq takes inputs by decreasing activation; groups stay as they lie. `none`: all as they lie.
    important_inputs: SLiM-Quant^O, which rounds one input in a hundred twice as finely.
    """

    method: Literal["absmax", "slim", "mse", "gptq"] = "gptq"
    strategy: Strategy | None = None  # type: ignore[assignment]  # settled when the model is known
    gguf_type: str | None = None
    types: Mapping[str, str] | None = None
    engine: Engine | None = None
    actorder: Literal["weight", "none"] = "weight"
    important_inputs: bool = False

    @field_validator("gguf_type")
    @classmethod
    def _known_type(cls, value: str | None) -> str | None:
        if value not in (None, AUTO):
            FileType.parse(value)
        return value

    @property
    def args(self) -> QuantizationArgs:
        """The grid alone; channels where what shares a scale is still open."""
        said = self.model_dump(include={*QuantizationArgs.model_fields})
        return QuantizationArgs(**said | {"strategy": self.strategy or "channel"})

    @property
    def is_open(self) -> bool:
        """Whether types are to be found."""
        return self.types is None and (self.engine is not None or self.gguf_type == AUTO)

    @model_validator(mode="after")
    def _fitting_types(self) -> "Quantize":
        if self.gguf_type is None:
            for name in (self.types or {}).values():
                QuantizationArgs.of_name(name)
        if self.engine is not None and self.gguf_type is not None:
            raise ValueError(f"{self.engine} runs no GGUF file; leave engine or gguf_type out")
        is_plain = self.symmetric and self.type == "int"
        if self.gguf_type is None and (self.engine or self.types) and not is_plain:
            raise ValueError("types are symmetric integers; leave asymmetric and float out")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> "Quantize":
        if self.method == "slim" and not (self.symmetric and self.type == "int"):
            raise ValueError("slim looks for symmetric grids of integers; take absmax, mse or gptq")
        if self.important_inputs and not self.symmetric:
            raise ValueError("important_inputs goes with symmetric grids")
        return self


class Adapt(Strict):
    """How the low-rank adapter is fitted.

    rank: a share of min(m, n), or a number. rounds: how often adapter and weights are fitted to one another.
    num_bits, group_size: of the adapter's own codes; by default it keeps the model's dtype.
    """

    method: AdapterMethod = "whitened"
    rank: float | int = 0.1
    rounds: Annotated[int, Field(ge=1)] = 1
    num_bits: Annotated[int, Field(ge=2, le=8)] | None = None
    group_size: Annotated[int, Field(ge=2)] = 128

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

    @property
    def args(self) -> QuantizationArgs | None:
        return None if self.num_bits is None else QuantizationArgs(num_bits=self.num_bits, group_size=self.group_size)

    def rank_of(self, linear: LinearShape) -> int:
        wanted = self.rank if isinstance(self.rank, int) else int(self.rank * linear.full_rank)
        return max(1, min(wanted, linear.full_rank))
