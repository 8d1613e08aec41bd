"""Factorized linears as modules: the same function in every form, trained, quantized part by part, saved and loaded."""

from typing import get_args

import pytest
import torch
from torch import Tensor, nn

import oracles
from compress.calibration.linears import LinearShape, LinearSite
from compress.models.factors import (
    AnyLinear,
    Form,
    factor_module,
    input_side,
    multiplied_out,
    num_stored,
    with_outputs,
)
from compress.numerics.lowrank import Factors, weighted
from compress.numerics.moments import InputMoments
from compress.own_model.modeling_compress import (
    LowRankLinear,
    PivotLinear,
)
from matrices import random

FORMS: tuple[Form, ...] = get_args(Form)
KINDS = {"factors": LowRankLinear, "pivot": PivotLinear}
M, N, RANK, ROWS = 9, 7, 3, 50
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

EVERY_FORM = pytest.mark.parametrize("form", FORMS)
EVERY_BIAS = pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
EVERY_DTYPE = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def drawn(has_bias: bool, *, m: int = M, n: int = N, rank: int = RANK, seed: int = 0) -> Factors:
    bias = random(m, seed=seed + 2) if has_bias else None
    return Factors(random(m, rank, seed=seed), random(rank, n, seed=seed + 1), bias)


def plain(factors: Factors, X: Tensor) -> Tensor:
    """y = B (A x) + bias, row by row."""
    rows = [factors.B @ (factors.A @ x) for x in X.double()]
    return torch.stack(rows) + (0 if factors.bias is None else factors.bias)


def difference(a: Tensor, b: Tensor) -> float:
    return oracles.largest_difference(a.detach(), b.detach())


@EVERY_DTYPE
@EVERY_BIAS
@EVERY_FORM
@pytest.mark.parametrize("rank", [1, min(M, N)])
def test_a_module_is_the_factors_function(rank, form, has_bias, dtype):
    for seed in range(5):
        factors = drawn(has_bias, rank=rank, seed=10 * seed)
        module = factor_module(factors, form, dtype)
        assert type(module) is KINDS[form]
        assert (module.in_features, module.out_features, module.rank) == (N, M, rank)
        assert all(parameter.dtype == dtype and not parameter.is_meta for parameter in module.parameters())
        X = random(4, N, seed=seed)
        assert difference(module(X.to(dtype)), plain(factors, X)) < 10 * TOLERANCE[dtype]
        weights = sum(parameter.numel() for parameter in module.parameters() if parameter.ndim == 2)
        assert weights == num_stored(M, N, rank, form)
        biases = sum(parameter.numel() for parameter in module.parameters() if parameter.ndim == 1)
        assert biases == (M if has_bias else 0)


def module_of(kind: str, has_bias: bool, dtype: torch.dtype) -> AnyLinear:
    factors = drawn(has_bias)
    if kind == "linear":
        return multiplied_out(factor_module(factors, "factors", dtype))
    return factor_module(factors, "pivot" if kind == "pivot" else "factors", dtype)


@EVERY_DTYPE
@EVERY_BIAS
@pytest.mark.parametrize("kind", ["linear", *FORMS])
def test_a_map_of_the_outputs_keeps_the_form(kind, has_bias, dtype):
    """Fewer outputs than before, as a slice of the stream leaves them, and a permutation of them."""
    X = random(4, N)
    for matrix in (random(5, M, seed=8), torch.eye(M).double()[torch.randperm(M)]):
        module = module_of(kind, has_bias, dtype)
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        changed = with_outputs(module, lambda columns, matrix=matrix: matrix @ columns)
        assert type(changed) is type(module)
        assert input_side(changed).weight.dtype == dtype
        assert difference(changed(X.to(dtype)), module(X.to(dtype)).double() @ matrix.T) < 50 * TOLERANCE[dtype]
        assert changed.out_features == len(matrix)
        assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def measured(X: Tensor) -> InputMoments:
    """Row by row."""
    second = torch.stack([torch.outer(x, x) for x in X]).mean(0)
    return InputMoments(second, X.mean(0), X.abs().mean(0))


def rows() -> Tensor:
    return random(ROWS, N) @ random(N, N, seed=1) + random(N, seed=2)


def site_of(holder: nn.Module, X: Tensor) -> LinearSite:
    linear = holder.get_submodule("fc")
    assert isinstance(linear, nn.Linear)
    shape = LinearShape.of("model.layers.3.mlp.fc", "mlp.fc", "mlp", linear)
    return LinearSite("block 3 mlp.fc", shape, linear, measured(X), put=lambda module: setattr(holder, "fc", module))


def holder_of(has_bias: bool) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"fc": nn.Linear(N, M, bias=has_bias).double(), "other": nn.Linear(M, N).double()})


def factorized(holder: nn.ModuleDict, form: Form, X: Tensor) -> LinearSite:
    site = site_of(holder, X)
    factors = weighted(site.weight, site.bias, site.inputs, RANK, name=site.name)
    site.replace(factor_module(factors, form, site.dtype))
    assert holder["fc"] is site.module
    return site


@EVERY_BIAS
@EVERY_FORM
def test_each_part_knows_its_own_inputs(form, has_bias):
    """Against what the modules are really given."""
    holder, X = holder_of(has_bias), rows()
    site = factorized(holder, form, X)
    seen: dict[str, Tensor] = {}
    for name, part in holder["fc"].named_children():
        part.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0].detach()}))
    holder["fc"](X)
    parts = list(site.linears())
    assert [part.name for part in parts] == ["block 3 mlp.fc first", "block 3 mlp.fc second"]
    assert [part.module for part in parts] == list(holder["fc"].children())
    for part, name in zip(parts, ("first", "second"), strict=True):
        expected = measured(seen[name])
        assert difference(part.inputs.second, expected.second) < 1e-10
        assert difference(part.inputs.mean, expected.mean) < 1e-10
        m, n = getattr(holder["fc"], name).weight.shape
        has = getattr(holder["fc"], name).bias is not None
        assert part.shape == LinearShape(f"model.layers.3.mlp.fc.{name}", f"mlp.fc.{name}", "mlp", m, n, has)
        assert torch.equal(part.weight, getattr(holder["fc"], name).weight)
    assert difference(parts[0].inputs.mean_abs, X.abs().mean(0)) < 1e-12
