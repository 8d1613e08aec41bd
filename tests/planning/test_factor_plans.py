"""Plans of factors, from config.json alone: published sizes, what is refused, and what is told."""

from collections.abc import Sequence
from typing import Any

import pytest

import tiny
from compress.planning.plan import Plan
from compress.recipe import parse_recipe
from factorizing import HALF, Stages, slicing
from orders import planned, refusal
from recipes import anchored, lowrank

# ---- what is refused, and what is told ----


def plan_of(model_type: str, stages: Stages, *, samples: int = 128, **more: Any) -> Plan:
    calibration = {"source": "stdlib", "samples": samples, "seq_len": 16}
    chosen = parse_recipe({"method": "test", "stages": list(stages), "calibration": calibration, **more})
    return planned(tiny.tiny_config(model_type), chosen)


BUDGET = {"budget": {"keep_params": 0.7, "trial_samples": 8}}
FAULTS: dict[str, tuple[Stages, dict[str, Any], str]] = {
    "a rank for no linear": (
        lowrank("lord", {"ranks": {"model.layers.0.mlp.down_proj": 8, "model.layers.7.mlp.down_proj": 8}}),
        {},
        "factorize gives a rank to model.layers.7.mlp.down_proj, which the model has not.",
    ),
    "a rank that a linear has not": (
        lowrank("lord", {"ranks": {"model.layers.0.mlp.down_proj": 33}}),
        {},
        "factorize gives model.layers.0.mlp.down_proj a rank of 33, its full one is 32.",
    ),
    "two stages at one linear": (
        lowrank("lord", HALF) + lowrank("lord", {"rank_frac": 0.25}),
        {},
        "Two stages would factorize self_attn.q_proj. Give each its own target.",
    ),
    "a slice beside the dense model's inputs": (
        [*slicing("llama", "shared", width=20, refit=False), *lowrank("svd", HALF)],
        {},
        "factorize goes by the dense model's inputs, so fold_norms cannot be beside it; "
        "give factorize inputs: compressed",
    ),
    "widths and ranks open": (
        [*anchored({}), *lowrank("anchored", {}, refit=False)],
        BUDGET,
        "a budget is spent on widths, ranks or types; tell slice how much to keep",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_does_not_fit_is_one_short_message(name):
    stages, more, fault = FAULTS[name]
    assert refusal(lambda: plan_of("llama", stages, **more)) == fault


def test_what_stays_dense_is_told():
    plan = plan_of("llama", lowrank("lord", {"rank_frac": 0.5}, form="factors"))
    assert plan.notes == [
        "Factors of this rank would be no smaller, so these stay dense: self_attn.q_proj (3 times), "
        "self_attn.o_proj (3 times)."
    ]


def test_too_little_text_is_told():
    few, enough = (plan_of("llama", lowrank("lord", HALF), samples=samples) for samples in (11, 12))
    (note,) = few.notes
    assert note == ("Calibration has 176 tokens for linears of 48 inputs: expect a poor fit. Use more --samples.")
    assert enough.notes == []


TARGETS: dict[str, tuple[Sequence[str], set[str]]] = {
    "attention": (["attention"], {"attn.c_attn", "attn.c_proj"}),
    "a pattern": (["*.c_proj"], {"attn.c_proj", "mlp.c_proj"}),
    "two": (["attention", "c_fc"], {"attn.c_attn", "attn.c_proj", "mlp.c_fc"}),
    "all": (["all"], {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets(name):
    target, expected = TARGETS[name]
    plan = plan_of("gpt_bigcode", lowrank("lord", {"rank": 8}, target=target))
    assert {path.split(".", 3)[-1] for path in plan.spec.factors} == expected
    assert len(plan.spec.factors) == tiny.NUM_BLOCKS * len(expected)
