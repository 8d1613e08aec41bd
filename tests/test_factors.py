"""Factorized linears as modules: the same function in every form, trained, quantized part by part, saved and loaded."""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import oracles
import tiny
from compress import families
from compress.architectures.architecture import ModelSpec
from compress.architectures.own import AUTO_MAP, CLASS, Own
from compress.calibration.linears import LinearShape, LinearSite
from compress.models.factors import (
    AnyLinear,
    Form,
    as_factors,
    factor_module,
    input_side,
    multiplied_out,
    num_stored,
    with_outputs,
)
from compress.numerics.lowrank import Factors, InputMoments, lord, svd
from compress.own_model.configuration_compress import CompressConfig
from compress.own_model.modeling_compress import (
    CompressForCausalLM,
    LowRankLinear,
    PivotLinear,
)
from matrices import random

FORMS: tuple[Form, ...] = get_args(Form)
KINDS = {"factors": LowRankLinear, "pivot": PivotLinear}
M, N, RANK, ROWS = 9, 7, 3, 50
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
UNSEEN = oracles.random_ids(2, 24, seed=3)

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


# ---- from factors to modules and back ----


@EVERY_DTYPE
@EVERY_BIAS
@EVERY_FORM
@pytest.mark.parametrize("rank", [1, RANK, min(M, N)])
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


@EVERY_DTYPE
@EVERY_BIAS
@EVERY_FORM
def test_back_to_factors(form, has_bias, dtype):
    factors = drawn(has_bias)
    module = factor_module(factors, form, dtype)
    found = as_factors(module)
    assert found.B.dtype == found.A.dtype == torch.float64
    assert difference(found.product, factors.product) < TOLERANCE[dtype]
    assert (found.bias is None) == (factors.bias is None)
    if found.bias is not None and factors.bias is not None:
        assert difference(found.bias, factors.bias) < TOLERANCE[dtype]
    # And what was once rounded comes back as it is.
    again = factor_module(found, "factors", torch.float64)
    assert difference(again(random(4, N)), plain(found, random(4, N))) < 1e-12


@EVERY_DTYPE
@EVERY_BIAS
@EVERY_FORM
def test_multiplied_out_it_is_one_linear(form, has_bias, dtype):
    factors = drawn(has_bias)
    linear = multiplied_out(factor_module(factors, form, dtype))
    assert type(linear) is nn.Linear
    assert (linear.in_features, linear.out_features, linear.weight.dtype) == (N, M, dtype)
    assert (linear.bias is not None) == has_bias
    assert difference(linear.weight, factors.product) < TOLERANCE[dtype]
    assert difference(linear(random(4, N).to(dtype)), plain(factors, random(4, N))) < 10 * TOLERANCE[dtype]
    assert linear.weight.is_contiguous()


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


# ---- part by part ----


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
    factors = lord(site.weight, site.bias, site.inputs, RANK, name=site.name)
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


# ---- the architecture ----

PATTERNS = {"mlp.up_proj": "pivot", "mlp.gate_proj": "pivot", "mlp.down_proj": "factors", "self_attn.q_proj": "factors"}


def in_dtype(dtype: torch.dtype, build: Callable[[], Any]) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return build()
    finally:
        torch.set_default_dtype(before)


def draw(model: Any, seed: int = 0) -> Any:
    """Every parameter matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model.eval()


def dense_model(model_type: str, dtype: torch.dtype) -> Any:
    if model_type != "sliced":
        return tiny.tiny_model(model_type, dtype=dtype)
    config = tiny.tiny_config("llama")
    family = families.find(config)
    widths = tuple(range(30, 30 - 2 * tiny.NUM_BLOCKS, -1))
    config = replace(ModelSpec.dense(Own(config, family), dtype), widths=(*widths, widths[-1])).config()
    return draw(in_dtype(dtype, lambda: CompressForCausalLM(config)))


def targets(dense: Any) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in dense.named_modules()
        if isinstance(module, nn.Linear) and any(name.endswith(pattern) for pattern in PATTERNS)
    }


def form_of(name: str) -> Form:
    (found,) = {form for pattern, form in PATTERNS.items() if name.endswith(pattern)}
    return "pivot" if found == "pivot" else "factors"


def thin(linear: nn.Linear, name: str, rank: int | None) -> LowRankLinear | PivotLinear:
    W, bias = linear.weight.double(), None if linear.bias is None else linear.bias.double()
    cut = svd(W.detach(), rank or min(W.shape))
    return factor_module(Factors(cut.B, cut.A, None if bias is None else bias.detach()), form_of(name), torch.float64)


def factors_config(dense: Any, modules: Mapping[str, LowRankLinear | PivotLinear]) -> Any:
    """The dense model's config, be it stock or ours already, with factors."""
    entries = {
        name: {
            "rank": module.rank,
            "form": "pivot" if isinstance(module, PivotLinear) else "factors",
            "bias": as_factors(module).bias is not None,
        }
        for name, module in modules.items()
    }
    if isinstance(dense.config, CompressConfig):
        config = copy.deepcopy(dense.config)
        config.factors = entries
        return config
    return CompressConfig(
        text_config=dense.config,
        structure=families.find(dense.config).structure(),
        factors=entries,
        architectures=[CLASS],
        auto_map=dict(AUTO_MAP),
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def lowrank_model(model_type: str, *, rank: int | None = 6, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """A model with factors, and the dense one whose linears are their products."""
    dense = dense_model(model_type, dtype)
    modules = {name: thin(linear, name, rank) for name, linear in targets(dense).items()}
    assert len(modules) == len(PATTERNS) * tiny.NUM_BLOCKS
    config = factors_config(dense, modules)
    model = in_dtype(dtype, lambda: CompressForCausalLM(config))
    state = dense.state_dict()
    for name, module in modules.items():
        state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{name}.")}
        state |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
        with torch.no_grad():
            targets(dense)[name].weight.copy_(as_factors(module).product)
    model.load_state_dict(state)
    return model.eval(), dense


TYPES = ["llama", "qwen2", "sliced"]  # with biases, with a head that is tied, with factors in narrow blocks


@pytest.mark.parametrize("rank", [None, 6], ids=["full rank", "rank 6"])
@pytest.mark.parametrize("model_type", TYPES)
def test_the_architecture_is_the_dense_one_with_products(model_type, rank):
    model, dense = lowrank_model(model_type, rank=rank)
    with oracles.exact_norms():
        assert difference(oracles.logits_of(model, UNSEEN), oracles.logits_of(dense, UNSEEN)) < 1e-9
        as_it_was = oracles.logits_of(dense_model(model_type, torch.float64), UNSEEN)
        assert (difference(oracles.logits_of(model, UNSEEN), as_it_was) < 1e-9) == (rank is None)


def orders(model: Any) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith(".order")}


@pytest.mark.parametrize("model_type", TYPES)
def test_saved_and_loaded_it_is_the_same(model_type, tmp_path):
    """The order of pivots too, which a fresh module has as none."""
    model, _ = lowrank_model(model_type)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(info.values())
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(orders(loaded)) == 2 * tiny.NUM_BLOCKS
    for name, order in orders(loaded).items():
        assert order.dtype == torch.int32
        assert torch.equal(order, orders(model)[name])
        assert order.tolist() != list(range(len(order)))
    assert torch.equal(oracles.logits_of(model, UNSEEN), oracles.logits_of(loaded.eval(), UNSEEN))
    assert loaded.config.factors == model.config.factors
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == (model_type == "qwen2")
    # The code that config.json speaks of goes with it.
    for name in json.loads((tmp_path / "config.json").read_text())["auto_map"].values():
        assert (tmp_path / f"{name.split('.')[0]}.py").is_file()
