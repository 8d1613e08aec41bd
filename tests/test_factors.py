"""Factorised linears as modules: the same function in every form, trained, quantized part by part, saved and loaded."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import oracles
import tiny
from compress import families
from compress.architectures.architecture import ModelSpec
from compress.architectures.own import AUTO_MAP, CLASS, Own
from compress.checkpoints.files import carry_modeling
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
from compress.streaming.linears import FactorShape, LinearShape, LinearSite, linear_shape

FORMS: tuple[Form, ...] = get_args(Form)
KINDS = {"factors": LowRankLinear, "pivot": PivotLinear}
M, N, RANK, ROWS = 9, 7, 3, 50
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
UNSEEN = oracles.random_ids(2, 24, seed=3)

EVERY_FORM = pytest.mark.parametrize("form", FORMS)
EVERY_BIAS = pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
EVERY_DTYPE = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


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


@EVERY_FORM
def test_windows_of_tokens_are_rows(form):
    module = factor_module(drawn(True), form, torch.float64)
    X = random(2, 5, N)
    assert difference(module(X), torch.stack([module(x) for x in X])) < 1e-12


def test_outputs_come_in_the_linears_order():
    factors = drawn(True)
    module = factor_module(factors, "pivot", torch.float64)
    assert isinstance(module, PivotLinear)
    assert module.order.dtype == torch.int32
    assert sorted(module.order.tolist()) == list(range(M))
    assert module.order.tolist() != list(range(M))
    X = random(4, N)
    found, expected = module(X), plain(factors, X)
    assert difference(found, expected) < 1e-12
    assert difference(torch.cat([module.first(X), module.second(module.first(X))], -1), expected) > 0.1


@pytest.mark.parametrize(("form", "rank"), [("factors", 4), ("pivot", 3)])
def test_as_many_directions_as_a_form_has_room_for(form, rank):
    """Pivots are fewer than the outputs: with all of them nothing is saved."""
    factors = drawn(True, m=4, n=6, rank=rank)
    module = factor_module(factors, form, torch.float64)
    assert difference(module(random(3, 6)), plain(factors, random(3, 6))) < 1e-12
    assert difference(multiplied_out(module).weight, factors.product) < 1e-12


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


@pytest.mark.parametrize("kind", ["linear", *FORMS])
def test_the_input_side_has_the_inputs_as_columns(kind):
    """Fewer inputs, in place: the function of what is left of them."""
    module = module_of(kind, True, torch.float64)
    side = input_side(module)
    assert side.weight.shape[1] == N
    X, kept = random(4, N), [0, 2, 5]
    X[:, [1, 3, 4, 6]] = 0
    expected = module(X)
    side.weight = nn.Parameter(side.weight[:, kept])
    assert difference(module(X[:, kept]), expected) < 1e-12


# ---- as modules ----


@EVERY_BIAS
@EVERY_FORM
def test_gradients_are_right(form, has_bias):
    module = factor_module(drawn(has_bias), form, torch.float64).requires_grad_()
    names, parameters = zip(*module.named_parameters(), strict=True)
    X = random(3, N).requires_grad_()

    def function(x: Tensor, *values: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))
        return result

    assert torch.autograd.gradcheck(function, (X, *parameters))


@EVERY_FORM
def test_torch_finds_plain_linears(form):
    module = factor_module(drawn(True), form, torch.float64).requires_grad_()
    assert [type(child) for child in module.children()] == [nn.Linear, nn.Linear]
    X = random(4, N)
    before = module(X).detach()
    vector = nn.utils.parameters_to_vector(module.parameters())
    nn.utils.vector_to_parameters(2 * vector, module.parameters())
    assert difference(module(X), before) > 0.1
    nn.utils.vector_to_parameters(vector, module.parameters())
    for part in (module.first, module.second):
        nn.utils.parametrizations.weight_norm(part)
    assert difference(module(X), before) < 1e-12
    module(X).square().sum().backward()
    assert nn.utils.clip_grad_norm_(module.parameters(), 1.0) > 0
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in module.parameters())


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
    shape = linear_shape("model.layers.3.mlp.fc", "mlp.fc", "mlp", linear)
    return LinearSite("block 3 mlp.fc", shape, linear, measured(X), put=lambda module: setattr(holder, "fc", module))


def holder_of(has_bias: bool) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"fc": nn.Linear(N, M, bias=has_bias).double(), "other": nn.Linear(M, N).double()})


def factorised(holder: nn.ModuleDict, form: Form, X: Tensor) -> LinearSite:
    site = site_of(holder, X)
    factors = lord(site.weight, site.bias, site.inputs, RANK, name=site.name)
    site.replace(factor_module(factors, form, site.dtype))
    assert holder["fc"] is site.module
    return site


def test_a_plain_linear_is_its_own_only_part():
    site = site_of(holder_of(True), rows())
    assert list(site.linears()) == [site]
    assert site.shape == LinearShape("model.layers.3.mlp.fc", "mlp.fc", "mlp", M, N, True)


@EVERY_BIAS
@EVERY_FORM
def test_each_part_knows_its_own_inputs(form, has_bias):
    """Against what the modules are really given."""
    holder, X = holder_of(has_bias), rows()
    site = factorised(holder, form, X)
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


@EVERY_FORM
def test_a_factorised_site_has_no_weight_of_its_own(form):
    site = factorised(holder_of(True), form, rows())
    with pytest.raises(TypeError, match=r"^block 3 mlp.fc is no plain linear any more; `linears\(\)` gives"):
        _ = site.weight


def rounded_to_nearest(part: LinearSite, bits: int) -> nn.Linear:
    """A scale for each output."""
    linear = nn.Linear(part.shape.n, part.shape.m, bias=part.bias is not None, dtype=part.dtype)
    scale = part.weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    with torch.no_grad():
        linear.weight.copy_((part.weight / scale).round() * scale)
        if part.bias is not None:
            linear.bias.copy_(part.bias)
    return linear


@EVERY_BIAS
@EVERY_FORM
@pytest.mark.parametrize("only", ["first", "second", "both"])
def test_a_quantizer_changes_the_parts_weights_alone(form, has_bias, only):
    holder, X = holder_of(has_bias), rows()
    site = factorised(holder, form, X)
    exact = holder["fc"](X).detach()
    before = {name: tensor.clone() for name, tensor in holder.state_dict().items()}
    touched = {"fc.first.weight", "fc.second.weight"} if only == "both" else {f"fc.{only}.weight"}
    errors = []
    for bits in (3, 8, 14):
        for name in touched:
            holder.get_parameter(name).data.copy_(before[name])
        for part in site.linears():
            if f"fc.{part.name.split()[-1]}.weight" in touched:
                quantized = rounded_to_nearest(part, bits)
                part.replace(quantized)
                assert part.module is quantized
        after = holder.state_dict()
        assert list(after) == list(before)
        assert {name for name in before if not torch.equal(before[name], after[name])} == touched
        assert holder["fc"] is site.module
        errors.append(difference(holder["fc"](X), exact))
    assert errors[0] > errors[1] > errors[2] > 0
    assert errors[2] < 1e-2 * float(exact.abs().max())


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loaded_in_16_bits_the_order_is_whole(dtype, tmp_path):
    model, _ = lowrank_model("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert all(torch.equal(order, orders(model)[name]) for name, order in orders(loaded).items())
    precise, logits = oracles.logits_of(model, UNSEEN), oracles.logits_of(loaded.eval(), UNSEEN)
    assert float((logits.float() - precise).square().mean() / precise.square().mean()) ** 0.5 < 0.05


def test_a_missing_bias_does_not_cost_the_order(tmp_path):
    """What is not in the file is drawn anew, what is in it stays."""
    model, _ = lowrank_model("llama")
    name = "model.layers.1.mlp.up_proj"
    state = {key: tensor for key, tensor in model.state_dict().items() if key != f"{name}.first.bias"}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {f"{name}.first.bias"}
    assert all(torch.equal(order, orders(model)[key]) for key, order in orders(loaded).items())


def test_a_tied_head_stays_tied(tmp_path):
    model, dense = lowrank_model("qwen2")
    assert dense.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.tie_word_embeddings
    with torch.no_grad():
        loaded.get_input_embeddings().weight[5] = 7.0
    assert (loaded.get_output_embeddings().weight[5] == 7).all()
    assert loaded.num_parameters() == model.num_parameters()
    loaded.resize_token_embeddings(tiny.VOCAB_SIZE + 5, mean_resizing=False)
    assert loaded.config.vocab_size == tiny.VOCAB_SIZE + 5
    assert oracles.logits_of(loaded, UNSEEN).shape[-1] == tiny.VOCAB_SIZE + 5


@pytest.mark.parametrize("model_type", TYPES)
def test_cached_generation_is_uncached_generation(model_type):
    model, _ = lowrank_model(model_type)
    ids = oracles.random_ids(2, 6, seed=4).clamp_min(3)
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "pad_token_id": 2}
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, **options, use_cache=False))
    step_by_step = ids
    for _ in range(10):
        logits = oracles.logits_of(model, step_by_step)[:, -1]
        logits[:, model.config.eos_token_id] = -torch.inf
        step_by_step = torch.cat([step_by_step, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(cached, step_by_step)


@pytest.mark.parametrize("model_type", TYPES)
def test_every_parameter_learns(model_type):
    """With gradient checkpointing as without: the same gradients."""
    model, _ = lowrank_model(model_type)
    model.train().requires_grad_()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            blocks = [module for name, module in model.named_modules() if name.endswith(("layers.0", "layers.1"))]
            assert len(blocks) == 2
            assert all(block.gradient_checkpointing for block in blocks)
        model.zero_grad()
        model(input_ids=UNSEEN, labels=UNSEEN, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert sum(".first." in name for name in gradients[0]) >= len(PATTERNS) * tiny.NUM_BLOCKS
    for name in gradients[0]:
        assert gradients[0][name].abs().max() > 0, name
        assert difference(gradients[0][name], gradients[1][name]) < 1e-10, name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("model_type", TYPES)
def test_adapters_find_the_two_linears(model_type):
    """LoRA: as it was at first, only adapters learn, and merged it is what was trained."""
    model, _ = lowrank_model(model_type)
    before = oracles.logits_of(model, UNSEEN)
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules=["first", "second"], task_type="CAUSAL_LM")
    adapted: Any = peft.get_peft_model(model, lora).double()
    assert difference(oracles.logits_of(adapted.eval(), UNSEEN), before) < 1e-9
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * len(PATTERNS) * tiny.NUM_BLOCKS
    optimizer = torch.optim.SGD(trained, lr=0.3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = adapted(input_ids=UNSEEN, labels=UNSEEN).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    after = oracles.logits_of(adapted, UNSEEN)
    assert difference(after, before) > 1e-4
    merged: Any = adapted.merge_and_unload()
    assert difference(oracles.logits_of(merged, UNSEEN), after) < 1e-9
    assert {type(module) for name, module in merged.named_modules() if name.endswith(("first", "second"))} == {
        nn.Linear
    }


@pytest.mark.parametrize("model_type", TYPES)
def test_it_can_be_made_from_its_config_alone(model_type):
    config = lowrank_model(model_type)[0].config
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        if name.endswith((".first.weight", ".second.weight")):
            assert 0.01 < parameter.std() < 0.03, name
    assert all(order.tolist() == list(range(len(order))) for order in orders(model).values())
    assert torch.isfinite(oracles.logits_of(model.eval(), UNSEEN)).all()


@pytest.mark.parametrize("model_type", TYPES)
def test_the_config_comes_back_whole(model_type, tmp_path):
    config = lowrank_model(model_type)[0].config
    config.save_pretrained(tmp_path)
    loaded: Any = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    assert loaded.factors == config.factors
    assert type(loaded.text_config) is type(config.text_config)
    assert loaded.text_config.to_dict() == config.text_config.to_dict()
    assert loaded.tie_word_embeddings == (model_type == "qwen2")
    assert loaded.vocab_size == tiny.VOCAB_SIZE
    assert loaded.get_text_config() is loaded.text_config.get_text_config()


def test_factors_stand_in_a_sliced_model_by_the_stock_names():
    config = tiny.tiny_config("llama")
    family = families.find(config)
    factors = {"model.layers.1.mlp.up_proj": FactorShape(4, "pivot", has_bias=True)}
    dense = ModelSpec.dense(Own(config, family), torch.float32)
    spec = replace(dense, widths=(24,) * (1 + 2 * tiny.NUM_BLOCKS), factors=factors)
    found = spec.model().get_submodule("model.layers.1.mlp.up_proj")
    assert isinstance(found, PivotLinear)
    assert (found.in_features, found.out_features, found.rank) == (24, 48, 4)


# ---- in clean processes ----

STRANGER = """
import json, os, sys
import torch
from transformers import AutoModelForCausalLM
argument, found = json.loads(sys.argv[1]), {}
for folder in argument["folders"]:
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        refused = ""
    except ValueError as error:
        refused = str(error)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(argument["ids"])).logits
    found[os.path.basename(folder)] = {
        "refused": refused,
        "logits": logits.tolist(),
        "orders": {name: buffer.tolist() for name, buffer in model.named_buffers() if name.endswith(".order")},
        "module": type(model).__module__,
        "inner": type(model.base_model).__module__,
        "compress": sorted(name for name in sys.modules if name.split(".")[0] == "compress"),
    }
print(json.dumps(found))
"""
STRANGERS = ["qwen2", "sliced"]


def carried(model_type: str, folder: Path) -> Any:
    """As a checkpoint is written: weights, config, and the files by their names."""
    model, _ = lowrank_model(model_type, dtype=torch.float32)
    model.save_pretrained(folder)
    for file in folder.glob("*.py"):
        file.unlink()
    carry_modeling(folder)
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    return model


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("clean")
    models = {name: carried(name, root / name) for name in STRANGERS}
    argument = json.dumps({"folders": [str(root / name) for name in STRANGERS], "ids": UNSEEN.tolist()})
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(root / "modules")}
    command = [sys.executable, "-I", "-c", STRANGER, argument]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return {"models": models, "stranger": json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize("model_type", STRANGERS)
def test_a_stranger_may_load_it_with_the_code_it_carries(model_type, outcomes):
    found, model = outcomes["stranger"][model_type], outcomes["models"][model_type]
    assert found["compress"] == []
    assert found["module"].startswith("transformers_modules.")
    assert found["inner"].startswith("transformers.models.")
    assert "trust_remote_code=True" in found["refused"]
    assert found["orders"] == {name: order.tolist() for name, order in orders(model).items()}
    assert difference(torch.tensor(found["logits"]), oracles.logits_of(model, UNSEEN)) < 1e-5
