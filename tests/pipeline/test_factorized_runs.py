"""Factorized models out of the pipeline: what is written is what was planned, reloads and computes what it should."""

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
from compress.planning.prepare import Job, read_windows
from compress.recipe import parse_recipe
from factorizing import HALF, Stages, Whole, block_linears, run_unproved, same_function, slicing
from recipes import lowrank
from runs import job_of

pytestmark = pytest.mark.usefixtures("exact_norms")
D = tiny.HIDDEN


# By model and how it is sliced: what is made, of a rank or a share. Of 20 channels starcoder2 has 18 directions.
SLICED: dict[str, tuple[str, Stages, dict[str, float]]] = {
    "fewer neurons": ("llama", slicing("llama", "shared", width=20, keep=12), HALF),
    "per layer": ("opt", slicing("opt", "per-layer", width=21, keep=12), HALF),
    "a high rank": ("starcoder2", slicing("starcoder2", "shared", width=20), {"rank": 17}),
    "whole": ("codegen", [{"stage": "refit"}], HALF),  # whose blocks return tuples
}


@pytest.mark.parametrize("name", SLICED)
def test_a_sliced_model_is_factorized_as_planned_and_computes_what_the_walk_did(name, tmp_path):
    """test_every_family.py loads factors in a process without this package."""
    model_type, before, rule = SLICED[name]
    job = job_of(tmp_path, model_type, [*before, *lowrank("anchored", rule, refit=False)])
    plan, made = pipeline.plan_only(job), contract.run_noted(job)
    assert plan.size == made.result.size
    assert made.result.ranks == {path: factors.rank for path, factors in plan.spec.factors.items()}
    assert made.result.ranks
    ids, expected = made.probe
    loaded = AutoModelForCausalLM.from_pretrained(made.out).eval()
    assert sum(parameter.numel() for parameter in loaded.parameters()) == plan.size.parameters
    same_function(oracles.logits_of(loaded, ids), expected, contract.CLOSE)


@pytest.mark.parametrize(("model_type", "rotation"), [("llama", "shared"), ("gpt_neox", "per-layer")])
def test_full_width_and_full_rank_keep_the_logits(model_type, rotation, tmp_path):
    """Through the pipeline, whose own walk says what the written model gives; proved elsewhere."""
    stages = [*slicing(model_type, rotation, width=D), Whole(rank_frac=1.0, form="factors")]
    made = contract.run_noted(job_of(tmp_path, model_type, stages, changes={"dtype": torch.float64}))
    assert len(made.result.ranks) == len(block_linears(tiny.tiny_model(model_type, num_hidden_layers=1)))
    ids, logits = made.probe
    same_function(logits, oracles.logits_of(tiny.tiny_model(model_type, num_hidden_layers=1), ids), 1e-8)


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
