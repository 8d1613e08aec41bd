"""Low-rank linears: build them from factors, read them back, multiply them out.

Arithmetic is float64; modules keep the dtype and the device that they are given.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from compress.numerics.lowrank import Factors, pivoted
from compress.own_model.modeling_compress import LowRankLinear, PivotLinear

AnyLinear = nn.Linear | LowRankLinear | PivotLinear
Form = Literal["factors", "pivot"]


def factor_module(factors: Factors, form: Form, dtype: torch.dtype) -> LowRankLinear | PivotLinear:
    return pivot_module(factors, dtype) if form == "pivot" else plain_module(factors, dtype)


def plain_module(factors: Factors, dtype: torch.dtype) -> LowRankLinear:
    (m, rank), n = factors.B.shape, factors.A.shape[1]
    with torch.device("meta"):
        module = LowRankLinear(n, m, rank, factors.bias is not None)
    fill(module.first, factors.A, None, dtype)
    fill(module.second, factors.B, factors.bias, dtype)
    return module


def pivot_module(factors: Factors, dtype: torch.dtype) -> PivotLinear:
    (m, rank), n = factors.B.shape, factors.A.shape[1]
    with torch.device("meta"):
        module = PivotLinear(n, m, rank, factors.bias is not None)
    split = pivoted(factors)
    first_bias = second_bias = None
    if factors.bias is not None:
        # The second linear is given the first one's outputs with their bias.
        first_bias = factors.bias[split.rows]
        second_bias = factors.bias[split.others] - split.C @ first_bias
    fill(module.first, split.A, first_bias, dtype)
    fill(module.second, split.C, second_bias, dtype)
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
    factors, dtype = as_factors(module), module.first.weight.dtype
    with torch.device("meta"):
        linear = nn.Linear(module.in_features, module.out_features, bias=factors.bias is not None)
    fill(linear, factors.product, factors.bias, dtype)
    return linear


def fill(linear: nn.Linear, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
    linear.weight = nn.Parameter(weight.to(dtype).contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(dtype).contiguous(), requires_grad=False)


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
        weight, bias = change(module.weight.double()), as_double(module.bias)
        with torch.device("meta"):
            linear = nn.Linear(weight.shape[1], len(weight), bias=bias is not None)
        fill(linear, weight, None if bias is None else change(bias), dtype)
        return linear
    factors = as_factors(module)
    bias = None if factors.bias is None else change(factors.bias)
    form: Form = "pivot" if isinstance(module, PivotLinear) else "factors"
    return factor_module(Factors(change(factors.B), factors.A, bias), form, dtype)
