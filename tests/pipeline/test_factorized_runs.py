"""Factorized models out of the pipeline: what is written is what was planned, reloads and computes what it should."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import compress
import contract
import oracles
import tiny
from compress import families, pipeline
from compress.models.hub import find_model
from compress.models.loading import load_config
from compress.planning.plan import Plan
from compress.planning.prepare import Job, read_windows
from compress.recipe import parse_recipe
from contract import Written
from factorizing import HALF, RANK, Whole, block_linears, run_unproved, same_function, slicing
from recipes import lowrank
from runs import job_of, tensors_of

pytestmark = pytest.mark.usefixtures("exact_norms")
D = tiny.HIDDEN


@pytest.mark.parametrize(("model_type", "form"), [("qwen2", "factors"), ("gpt_bigcode", "dense"), ("mixtral", "pivot")])
def test_what_is_planned_is_what_is_written_and_loaded(model_type, form, tmp_path):
    job = job_of(tmp_path, model_type, lowrank("lord", {"rank_frac": 0.4}, form=form), dtype="bfloat16")
    plan, result = run_unproved(job)
    tensors = tensors_of(job.out)
    assert plan.size == result.size
    assert result.size.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert {path: factors.rank for path, factors in plan.spec.factors.items()} == (
        result.ranks if form != "dense" else {}
    )
    loaded: Any = AutoModelForCausalLM.from_pretrained(job.out)
    parameters = sum(parameter.numel() for parameter in loaded.parameters())
    assert result.size.parameters == parameters
    indices = {name: tensor for name, tensor in tensors.items() if not tensor.is_floating_point()}
    assert bool(indices) == (form == "pivot")
    # Indices are bytes, no parameters.
    assert result.size.bytes == 2 * parameters + 4 * sum(tensor.numel() for tensor in indices.values())
    for name, tensor in indices.items():
        assert name.endswith(".order")
        assert tensor.dtype == torch.int32
        assert sorted(tensor.tolist()) == list(range(len(tensor)))
    factored = {path for path in result.ranks if f"{path}.second.weight" in tensors}
    assert factored == (set() if form == "dense" else set(result.ranks))
    assert result.is_stock == (form == "dense")
    assert plan.removed == 1 - result.size.parameters / result.dense.parameters


# ---- together with slicing ----


COMPOSED: dict[str, tuple[str, str, int, int | None]] = {
    "llama, fewer neurons": ("llama", "shared", 20, 12),
    "opt, per layer, fewer neurons": ("opt", "per-layer", 21, 12),
    "starcoder2, a high rank": ("starcoder2", "shared", 20, None),
}


def composed(folder: Path, name: str) -> Job:
    model_type, rotation, width, keep = COMPOSED[name]
    # A stream of 20 channels has 18 directions in starcoder2.
    rule = {"rank": 17} if "high" in name else {"rank_frac": 0.5}
    stages = slicing(model_type, rotation, width=width, keep=keep)
    return job_of(folder, model_type, [*stages, *lowrank("anchored", rule, refit=False)])


@pytest.mark.parametrize(("model_type", "rotation"), [("llama", "shared"), ("gpt_neox", "per-layer")])
def test_full_width_and_full_rank_keep_the_logits(model_type, rotation, tmp_path):
    """Through the pipeline, whose own walk says what the written model gives; proved elsewhere."""
    stages = [*slicing(model_type, rotation, width=D), Whole(rank_frac=1.0, form="factors")]
    job = job_of(tmp_path, model_type, stages, changes={"dtype": torch.float64})
    made = contract.run_noted(job)
    assert len(made.result.ranks) == len(block_linears(tiny.tiny_model(model_type, num_hidden_layers=1)))
    ids, logits = made.probe
    dense = tiny.tiny_model(model_type, num_hidden_layers=1)
    same_function(logits, oracles.logits_of(dense, ids), 1e-8)


# One with a head of its own, a tied one, blocks that return tuples.
UNSLICED = ("opt", "codegen")
MATERIALIZED = ("llama",)


@pytest.fixture(scope="module")
def planned_and_made(tmp_path_factory) -> tuple[Mapping[str, Plan], Mapping[str, Written]]:
    root = tmp_path_factory.mktemp("runs")
    jobs = {f"sliced: {name}": composed(root / f"sliced-{number}", name) for number, name in enumerate(COMPOSED)}
    for name in UNSLICED:
        jobs[f"whole: {name}"] = job_of(root / f"whole-{name}", name, lowrank("anchored", HALF, gradient_weight=0.9))
    for name in MATERIALIZED:
        jobs[f"dense: {name}"] = multiplied_out(root / f"dense-{name}", name, "dense")
    plans = {name: pipeline.plan_only(job) for name, job in jobs.items()}
    return plans, {name: contract.run_noted(job) for name, job in jobs.items()}


@pytest.mark.parametrize("name", COMPOSED)
def test_a_sliced_model_is_factorized_as_it_was_planned(name, planned_and_made):
    plan, result = planned_and_made[0][f"sliced: {name}"], planned_and_made[1][f"sliced: {name}"].result
    assert plan.size == result.size
    assert result.widths[0] == COMPOSED[name][2]
    assert result.ranks == {path: factors.rank for path, factors in plan.spec.factors.items()}
    assert result.ranks


@pytest.mark.parametrize("name", ["llama, fewer neurons", "opt, per layer, fewer neurons"])
def test_a_sliced_and_factorized_config_comes_back_from_json(name, planned_and_made, tmp_path):
    plan = planned_and_made[0][f"sliced: {name}"]
    config = plan.spec.config(torch.float32)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config.to_diff_dict(), default=str), encoding="utf-8")
    again: Any = type(config).from_pretrained(tmp_path / "saved")
    assert again.to_dict() == config.to_dict()
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(again)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert numbers == plan.size.parameters


def multiplied_out(folder: Path, model_type: str, form: str) -> Job:
    stages = lowrank("lord", {"rank": RANK}, form=form, bias=False)
    return job_of(folder, model_type, stages, changes={"dtype": torch.float64})


@pytest.mark.parametrize("name", [f"sliced: {name}" for name in COMPOSED] + [f"whole: {name}" for name in UNSLICED])
def test_loaded_it_computes_what_the_walk_did(name, planned_and_made):
    """test_every_family.py loads factors in a process without this package."""
    made = planned_and_made[1][name]
    ids, expected = made.probe
    loaded = AutoModelForCausalLM.from_pretrained(made.out).eval()
    same_function(oracles.logits_of(loaded, ids), expected, contract.CLOSE)


@pytest.mark.parametrize("model_type", MATERIALIZED)
def test_materialized_it_is_a_stock_model(model_type, planned_and_made, tmp_path):
    """At one function with the factors."""
    made = planned_and_made[1][f"dense: {model_type}"]
    job = multiplied_out(tmp_path, model_type, "pivot")
    run_unproved(job)
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (made.out, job.out)]
    assert type(models[0]).__module__.startswith("transformers.models.")
    assert list(made.out.glob("*.py")) == []
    dense, factors = (oracles.logits_of(model, made.probe[0]) for model in models)
    same_function(dense, factors, 1e-8)


# ---- on a model that was trained ----

DEMO = Path(compress.__file__).parent / "assets/demo"


def test_anchored_ends_nearer_to_the_dense_model_than_lord(tmp_path):
    """The stream before the final norm, on the calibration text; at the same ranks."""
    errors = {}
    dense: Any = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    for method in ("anchored", "lord"):
        calibration = {"source": "stdlib", "samples": 16, "seq_len": 64}
        stages = lowrank(method, {"rank_frac": 0.4}, bias=False if method == "lord" else None)
        chosen = parse_recipe({"method": method, "stages": stages, "calibration": calibration})
        job = Job(model=find_model(str(DEMO)), recipe=chosen, out=tmp_path / method, command="compress lord")
        _, result = run_unproved(job)
        assert result.ranks
        windows = read_windows(job, DEMO, load_config(DEMO))
        made: Any = AutoModelForCausalLM.from_pretrained(tmp_path / method, dtype=torch.float32).eval()
        there = last_stream(dense, dense.config, windows)
        here = last_stream(made, dense.config, windows)
        errors[method] = float((here - there).square().sum() / there.square().sum())
    assert 0 < errors["anchored"] < 0.9 * errors["lord"]


@torch.no_grad()
def last_stream(model: Any, config: Any, windows: Tensor) -> Tensor:
    found: list[Tensor] = []
    norm = model.get_submodule(families.find(config).final_norm)
    handle = norm.register_forward_pre_hook(lambda _module, inputs: found.append(inputs[0].double()))
    for ids in windows.split(8):
        model(input_ids=ids, use_cache=False)
    handle.remove()
    return torch.cat(found)
