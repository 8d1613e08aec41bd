"""Low-rank linears, built from factors, read back, multiplied out; and linears in the form that a checkpoint has.

Arithmetic is float64; modules keep the dtype and the device that they are given.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.numerics.frames import Lift
from compress.numerics.lowrank import Factors, pivoted
from compress.own_model.modeling_compress import FORMS, LowRankLinear, PivotLinear

AnyLinear = nn.Linear | LowRankLinear | PivotLinear
Form = Literal["factors", "pivot"]


def factor_module(factors: Factors, form: Form, dtype: torch.dtype) -> LowRankLinear | PivotLinear:
    (m, rank), n, bias = factors.B.shape, factors.A.shape[1], factors.bias
    with torch.device("meta"):
        module: Any = FORMS[form](n, m, rank, bias is not None)
    if isinstance(module, LowRankLinear):
        fill(module.first, factors.A, None, dtype)
        fill(module.second, factors.B, bias, dtype)
        return module
    split = pivoted(factors)
    # The second linear is given the first one's outputs with their bias.
    first = None if bias is None else bias[split.rows]
    second = None if bias is None or first is None else bias[split.others] - split.C @ first
    fill(module.first, split.A, first, dtype)
    fill(module.second, split.C, second, dtype)
    module.order = nn.Buffer(torch.cat([split.rows, split.others]).argsort().to(torch.int32))
    return module


def as_factors(module: LowRankLinear | PivotLinear) -> Factors:
    first, second = module.first, module.second
    if isinstance(module, LowRankLinear):
        return Factors(second.weight.double(), first.weight.double(), as_double(second.bias))
    identity = torch.eye(module.rank, dtype=torch.float64, device=first.weight.device)
    order = module.order.long()
    bias = None
    if first.bias is not None:
        pivots = first.bias.double()
        bias = torch.cat([pivots, second.bias.double() + second.weight.double() @ pivots])[order]
    return Factors(torch.cat([identity, second.weight.double()])[order], first.weight.double(), bias)


def multiplied_out(module: LowRankLinear | PivotLinear) -> nn.Linear:
    """Multiply the factors out into one dense linear."""
    factors = as_factors(module)
    return dense_module(factors.product, factors.bias, module.first.weight.dtype)


def dense_module(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], len(weight), bias=bias is not None)
    fill(linear, weight, bias, dtype)
    return linear


def fill(linear: nn.Linear, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
    linear.weight = frozen(weight, dtype)
    if bias is not None:
        linear.bias = frozen(bias, dtype)


def frozen(values: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(values.to(dtype).contiguous(), requires_grad=False)


def as_double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def tensor_names(form: Form, *, has_bias: bool) -> list[str]:
    """Names of a low-rank linear's tensors, below its own name."""
    if form == "pivot":
        return ["first.weight", "second.weight", "order"] + (["first.bias", "second.bias"] if has_bias else [])
    return ["first.weight", "second.weight"] + (["second.bias"] if has_bias else [])


def num_stored(m: int, n: int, rank: int, form: Form) -> int:
    """Count the numbers of the two weights, without a bias."""
    return rank * (m + n - rank) if form == "pivot" else rank * (m + n)


def input_side(module: AnyLinear) -> nn.Linear:
    """The linear whose weight's columns are the module's inputs."""
    return module if isinstance(module, nn.Linear) else module.first


def with_outputs(module: AnyLinear, change: Callable[[Tensor], Tensor]) -> AnyLinear:
    """Apply a linear map to the module's outputs, keeping its form and dtype.

    change: does it to the rows of a matrix (m, ...), or to the entries of a vector (m,).
    """
    dtype = input_side(module).weight.dtype
    if isinstance(module, nn.Linear):
        own = as_double(module.bias)
        return dense_module(change(module.weight.double()), None if own is None else change(own), dtype)
    factors = as_factors(module)
    bias = None if factors.bias is None else change(factors.bias)
    form: Form = "pivot" if isinstance(module, PivotLinear) else "factors"
    return factor_module(Factors(change(factors.B), factors.A, bias), form, dtype)


# Linears in their written form while the walk's activations are still in another. A checkpoint may have the stream in
# other coordinates than the walk, or its norms with another gain. Most linears are brought into that form when nothing
# more is done to them. One that is stored in few bits has to be in it before.


@dataclass(frozen=True)
class WrittenForm:
    """How a linear's weight differs between the walk and the checkpoint.

    inputs, outputs: maps from the walk's to the checkpoint's.
    has_bias: it has a bias there, of zeros where it had none.
    """

    inputs: Lift = field(default_factory=Lift)
    outputs: Lift = field(default_factory=Lift)
    has_bias: bool = False

    @property
    def is_identity(self) -> bool:
        return self.inputs.is_identity and self.outputs.is_identity and not self.has_bias


class Written(nn.Module):
    """Run a linear in its written form on the walk's inputs and outputs."""

    def __init__(self, inner: nn.Module, form: WrittenForm, in_features: int) -> None:
        super().__init__()
        self.inner = inner
        self.form = form
        self.in_features = in_features

    def forward(self, x: Tensor) -> Tensor:
        return self.form.outputs.down(self.inner(self.form.inputs.up(x)))


def in_form(module: AnyLinear, form: WrittenForm) -> AnyLinear:
    """Convert a linear, low-rank or not, to the checkpoint's inputs and outputs; in place where outputs stay."""
    if form.is_identity:
        return module
    if not form.outputs.is_identity:
        module = with_outputs(module, form.outputs.rows)
    side = input_side(module)
    if not form.inputs.is_identity:
        side.weight = frozen(form.inputs.functional(side.weight.double()), side.weight.dtype)
        module.in_features = side.in_features = side.weight.shape[1]
    if form.has_bias and isinstance(module, nn.Linear) and module.bias is None:  # factors say themselves if they have
        module.bias = nn.Parameter(side.weight.new_zeros(len(side.weight)), requires_grad=False)
    return module
