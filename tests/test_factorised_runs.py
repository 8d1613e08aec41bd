"""Factorised models out of the pipeline: what is written is what was planned, reloads and computes what it should."""

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
from compress.job import Job
from compress.models.hub import find_model
from compress.preflight import read_windows
from compress.recipe import parse_recipe
from contract import Looked, Written
from factorising import (
    FORMS,
    HALF,
    RANK,
    Stages,
    Whole,
    block_linears,
    job_of,
    run_unproved,
    same_function,
    slicing,
)
from recipes import lowrank
from runs import tensors_of

D = tiny.HIDDEN
SLOW = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _exact():
    with oracles.exact_norms():
        yield


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "model_type",
    [name if name in ("llama", "qwen2", "gpt_bigcode") else pytest.param(name, marks=SLOW) for name in tiny.FAMILIES],
)
def test_what_is_planned_is_what_is_written_and_loaded(model_type, form, tmp_path):
    job = job_of(tmp_path, model_type, lowrank("lord", {"rank_frac": 0.4}, form=form), dtype="bfloat16")
    plan, result = run_unproved(job)
    tensors = tensors_of(job.out)
    assert plan.size == result.size
    assert result.size.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert {path: factors.rank for path, factors in plan.factors.items()} == (result.ranks if form != "dense" else {})
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


@pytest.mark.slow
def test_the_pipeline_proves_it(tmp_path):
    """In a clean process of its own."""
    job = job_of(tmp_path, "gpt_bigcode", lowrank("anchored", HALF, gradient_weight=0.9))
    result = pipeline.run(job)
    assert result.difference is not None
    assert result.difference < 1e-5
    assert result.divergence is not None
    assert result.divergence > 0


# ---- together with slicing ----


CUT: list[dict[str, Any]] = lowrank("anchored", {"rank_frac": 0.5}, refit=False)
COMPOSED: dict[str, tuple[str, str, int, int | None]] = {
    "llama": ("llama", "shared", 20, None),
    "llama, fewer neurons": ("llama", "shared", 20, 12),
    "llama, per layer": ("llama", "per-layer", 20, None),
    "llama, per layer, fewer neurons": ("llama", "per-layer", 20, 12),
    "opt": ("opt", "shared", 21, None),
    "opt, per layer, fewer neurons": ("opt", "per-layer", 21, 12),
    "qwen2, which becomes a llama": ("qwen2", "shared", 20, None),
    "phi": ("phi", "shared", 20, None),
    "phi, fewer neurons": ("phi", "shared", 21, 12),
    "starcoder2": ("starcoder2", "shared", 20, None),
    "starcoder2, a high rank": ("starcoder2", "shared", 20, None),
    "starcoder2, fewer neurons": ("starcoder2", "shared", 24, 12),
    "gemma": ("gemma", "shared", 20, None),
    "qwen3": ("qwen3", "shared", 20, None),
    "gpt_neox": ("gpt_neox", "shared", 21, 12),
    "phi3": ("phi3", "shared", 20, 12),
}


QUICK_COMPOSED = (
    "llama, fewer neurons",
    "opt, per layer, fewer neurons",
    "qwen2, which becomes a llama",
    "phi",
    "starcoder2, a high rank",
)


@pytest.mark.parametrize(
    "name", [name if name in QUICK_COMPOSED else pytest.param(name, marks=SLOW) for name in COMPOSED]
)
def test_a_sliced_model_is_factorised_as_it_was_planned(name, tmp_path):
    model_type, rotation, width, keep = COMPOSED[name]
    # A stream of 20 channels has 18 directions in starcoder2.
    rule = {"rank": 17} if "high" in name else {"rank_frac": 0.5}
    cut_stages = lowrank("anchored", rule, refit=False)
    job = job_of(tmp_path, model_type, [*slicing(model_type, rotation, width=width, keep=keep), *cut_stages])
    plan, result = run_unproved(job)
    assert plan.size == result.size
    assert result.widths[0] == width
    assert result.ranks == {path: factors.rank for path, factors in plan.factors.items()}
    assert result.ranks


@pytest.mark.parametrize("model_type", ["llama", "opt"])
@pytest.mark.parametrize("rotation", ["shared", "per-layer"])
def test_a_sliced_and_factorised_config_comes_back_from_json(model_type, rotation, tmp_path):
    job = job_of(tmp_path, model_type, [*slicing(model_type, rotation, width=20), *CUT])
    plan = pipeline.plan_only(job)
    config = plan.target.config(plan.shape, torch.float32)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config.to_diff_dict(), default=str), encoding="utf-8")
    again: Any = type(config).from_pretrained(tmp_path / "saved")
    assert again.to_dict() == config.to_dict()
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(again)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert plan.size is not None
    assert numbers == plan.size.parameters


FULL_WIDTH = ["llama", "opt", "phi", "gemma", "qwen3", "qwen2", "phi3", "gpt_neox"]


@pytest.mark.parametrize("rotation", ["shared", "per-layer"])
@pytest.mark.parametrize(
    "model_type", [name if name in ("llama", "opt", "phi") else pytest.param(name, marks=SLOW) for name in FULL_WIDTH]
)
def test_full_width_and_full_rank_keep_the_logits(model_type, rotation, tmp_path, monkeypatch):
    """Through the pipeline, whose own walk says what the written model gives; proved elsewhere."""
    stages = [*slicing(model_type, rotation, width=D), Whole(rank_frac=1.0, form="factors")]
    job = job_of(tmp_path, model_type, stages, changes={"dtype": torch.float64})
    overheard: list[tuple[Tensor, Tensor]] = []

    def overhear(_folder: Path, ids: Tensor, logits: Tensor, **_options: Any) -> float:
        overheard.append((ids, logits))
        return 0.0

    monkeypatch.setattr(pipeline, "verify", overhear)
    result = pipeline.run(job)
    assert len(result.ranks) == len(block_linears(tiny.tiny_model(model_type, num_hidden_layers=1)))
    ((ids, logits),) = overheard
    dense = tiny.tiny_model(model_type, num_hidden_layers=1)
    same_function(logits, oracles.logits_of(dense, ids), 1e-8)


def test_two_stages_at_different_linears(tmp_path):
    stages = lowrank("lord", HALF, target=["attention"]) + lowrank("svd", {"rank": 7}, target=["mlp"])
    job = job_of(tmp_path, "llama", stages)
    plan, result = run_unproved(job)
    assert plan.size == result.size
    assert {rank for path, rank in result.ranks.items() if ".mlp." in path} == {7}
    assert {rank for path, rank in result.ranks.items() if ".self_attn." in path} == {8, 16}


# ---- what a process without our code loads ----

# One for each way of being written; what is planned is compared with what is written for all.
RELOADED = (
    "llama, fewer neurons",
    "llama, per layer",
    "opt",
    "qwen2, which becomes a llama",
    "phi, fewer neurons",
    "starcoder2, a high rank",
    "gpt_neox",
)
# With a head of its own, a tied one, blocks that return tuples.
UNSLICED = ("llama", "opt", "gpt_bigcode", "codegen")
MATERIALIZED = ("llama", "gpt_bigcode", "qwen2", "phi")


def reloaded_jobs(root: Path) -> dict[str, Job]:
    jobs = {}
    for number, name in enumerate(RELOADED):
        model_type, rotation, width, keep = COMPOSED[name]
        stages: Stages = [*slicing(model_type, rotation, width=width, keep=keep), *CUT]
        jobs[f"sliced: {name}"] = job_of(root / f"sliced-{number}", model_type, stages)
    for name in UNSLICED:
        stages = lowrank("anchored", HALF, gradient_weight=0.9)
        jobs[f"whole: {name}"] = job_of(root / f"whole-{name}", name, stages)
    for name in MATERIALIZED:
        jobs[f"dense: {name}"] = multiplied_out(root / f"dense-{name}", name, "dense")
    return jobs


def multiplied_out(folder: Path, model_type: str, form: str) -> Job:
    stages = lowrank("lord", {"rank": RANK}, form=form, bias=False)
    return job_of(folder, model_type, stages, changes={"dtype": torch.float64})


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory) -> tuple[Mapping[str, Written], Looked]:
    root = tmp_path_factory.mktemp("reloaded")
    made = {name: contract.run_noted(job) for name, job in reloaded_jobs(root).items()}
    return made, contract.look_at(made, root)


@pytest.mark.parametrize("name", [f"sliced: {name}" for name in RELOADED] + [f"whole: {name}" for name in UNSLICED])
@pytest.mark.slow
def test_it_reloads_without_our_package(name, reloaded):
    made, looked = reloaded
    looked.agrees(name, made[name])


@pytest.mark.parametrize("model_type", MATERIALIZED)
@pytest.mark.slow
def test_materialized_it_is_a_stock_model(model_type, reloaded, tmp_path):
    """At one function with the factors."""
    made, looked = reloaded
    name = f"dense: {model_type}"
    looked.agrees(name, made[name])
    found = looked.models[name]
    assert found["module"].startswith("transformers.models.")
    assert (found["info"], found["said"]) == ({}, [])
    assert list(made[name].out.glob("*.py")) == []
    job = multiplied_out(tmp_path, model_type, "pivot")
    run_unproved(job)
    factors = AutoModelForCausalLM.from_pretrained(job.out).eval()
    ids = made[name].probe[0]
    same_function(looked.logits[f"{name}/probe"], oracles.logits_of(factors, ids), 1e-8)


# ---- on a model that was trained ----

DEMO = Path(compress.__file__).parent / "assets/demo"


@pytest.mark.slow
def test_anchored_ends_nearer_to_the_dense_model_than_lord(tmp_path):
    """The stream before the final norm, on the calibration text; at the same ranks."""
    errors = {}
    dense: Any = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    for method in ("anchored", "lord"):
        calibration = {"source": "stdlib", "samples": 24, "seq_len": 128}
        stages = lowrank(method, {"rank_frac": 0.4}, bias=False if method == "lord" else None)
        chosen = parse_recipe({"method": method, "stages": stages, "calibration": calibration})
        job = Job(model=find_model(str(DEMO)), recipe=chosen, out=tmp_path / method, command="compress lord")
        _, result = run_unproved(job)
        assert result.ranks
        windows = read_windows(job, DEMO)
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
