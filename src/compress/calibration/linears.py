"""One linear layer of a block, for stages that work on linears one by one: factorizing, quantizing, pruning.

Such a stage finds the linear as the stages before it left it (refitted toward the dense model, where `refit` is among
them), what the calibration text gives it as inputs and, where a survey was asked for it, how the loss feels an error of
its outputs. It puts another module, or other weights, in its place. What has been factorized is two linears, which
later stages find one by one by `linears()`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from compress.models.factors import AnyLinear, Form, num_stored
from compress.numerics.moments import InputMoments
from compress.own_model.modeling_compress import AdaptedLinear, LowRankLinear, PivotLinear

# What a linear can have become.
Rewritten = AnyLinear | AdaptedLinear


@dataclass(frozen=True)
class LinearShape:
    """The shape (m, n) of a linear of a block, known from the config alone.

    path: below the causal LM. name: below the block. part: of the block, `attention` or `mlp`.
    """

    path: str
    name: str
    part: str
    m: int
    n: int
    has_bias: bool

    @classmethod
    def of(cls, path: str, name: str, part: str, linear: nn.Linear) -> "LinearShape":
        m, n = linear.weight.shape
        return cls(path, name, part, m, n, linear.bias is not None)

    @property
    def full_rank(self) -> int:
        return min(self.m, self.n)


@dataclass(frozen=True)
class FactorShape:
    """The low-rank factors that replace a linear: rank, form, and whether they have a bias."""

    rank: int
    form: Form
    has_bias: bool

    def stored(self, linear: LinearShape) -> int:
        """Count the numbers stored in place of the weight; a bias counts where the linear had none."""
        added = linear.m if self.has_bias and not linear.has_bias else 0
        return num_stored(linear.m, linear.n, self.rank, self.form) + added


@dataclass
class LinearSite:
    """One linear, and second moments of its inputs: what `factorize` and `slim` work on.

    name: as a user should read it, "block 3 mlp.down_proj". shape: of the linear when the site was met.
    inputs: E x x^T, E x and E |x| of what it is given, over the calibration tokens.
    put: what puts a module into its place.
    read_gradient: reads `gradient` from where the survey has put it.
    notes: what stages have to say in the report.
    """

    name: str
    shape: LinearShape
    module: Rewritten
    inputs: InputMoments
    put: Callable[[Rewritten], None]
    read_gradient: Callable[[], Tensor | None] | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def weight(self) -> Float64[Tensor, "m n"]:
        return self._linear.weight.double()

    @property
    def bias(self) -> Float64[Tensor, "m"] | None:
        return None if self._linear.bias is None else self._linear.bias.double()

    @property
    def dtype(self) -> torch.dtype:
        return self._linear.weight.dtype

    @property
    def gradient(self) -> Tensor | None:
        """E g g^T, g the loss's gradient by the outputs in the dense model; only the diagonal for a wide linear."""
        return None if self.read_gradient is None else self.read_gradient()

    @property
    def _linear(self) -> nn.Linear:
        if not isinstance(self.module, nn.Linear):
            raise TypeError(f"{self.name} is no plain linear any more; `linears()` gives a factorized one's parts.")
        return self.module

    def lost(self, product: Float64[Tensor, "m n"], *, centered: bool) -> float:
        return lost(self.weight, product, self.inputs, centered=centered)

    @property
    def product(self) -> Float64[Tensor, "m n"]:
        """The matrix that it multiplies by, in whatever form it is stored."""
        if not isinstance(self.module, LowRankLinear | PivotLinear):
            return weight_of(self.module)
        first, second = weight_of(self.module.first), weight_of(self.module.second)
        if isinstance(self.module, LowRankLinear):
            return second @ first
        return torch.cat([first, second @ first])[self.module.order.long()]

    def replace(self, module: Rewritten) -> None:
        self.module = module
        self.put(module)

    def linears(self) -> Iterator["LinearSite"]:
        """Yield the plain linears at the site: the linear itself, or its two factors, each with its own inputs."""
        if isinstance(self.module, nn.Linear):
            yield self
            return
        thin = self.module
        assert isinstance(thin, LowRankLinear | PivotLinear)

        def part(name: str, inputs: InputMoments, gradient: Callable[[], Tensor | None] | None) -> LinearSite:
            linear: nn.Linear = getattr(thin, name)  # plain until its own turn comes
            shape = LinearShape.of(f"{self.shape.path}.{name}", f"{self.shape.name}.{name}", self.shape.part, linear)
            put = partial(setattr, thin, name)
            return LinearSite(f"{self.name} {name}", shape, linear, inputs, put, gradient, self.notes)

        yield part("first", self.inputs, None)
        # By the first as it is now: whoever quantized it sees what it gives.
        first: nn.Module = thin.first
        assert isinstance(first, nn.Linear | AdaptedLinear)
        between = self.inputs.through(weight_of(first))
        if first.bias is not None:
            between = between.shifted(first.bias.double())
        yield part("second", between, self.read_gradient if isinstance(thin, LowRankLinear) else None)


def lost(W: Tensor, product: Tensor, inputs: InputMoments, *, centered: bool) -> float:
    """The share of the outputs' energy, or of their variance, that is lost with `product` (m, n) in place of W.

    To the seven digits of float32: no other number depends on it.
    """
    C = inputs.spread(centered=centered).C.float()
    missed, whole = ((M @ C * M).sum(dtype=torch.float64) for M in ((W - product).float(), W.float()))
    return float(missed / whole.clamp_min(1e-300))


def weight_of(module: nn.Linear | AdaptedLinear) -> Float64[Tensor, "m n"]:
    """The matrix that a linear multiplies by, its adapter included."""
    if isinstance(module, nn.Linear):
        return module.weight.double()
    W = module.rows(0, module.out_features, torch.float64)
    adapter = module.adapter(torch.float64)
    return W if adapter is None else W + adapter[1].T @ adapter[0]
