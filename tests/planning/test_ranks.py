"""Ranks under a budget: a promise that is kept, spent to the last step, and found again by a run that was killed."""

import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

import tiny
from cli_runner import snapshot
from compress import pipeline
from compress.architectures.architecture import disk_bytes
from compress.calibration.observers import Spectrum
from compress.planning import search
from compress.planning.budget import RankSpace, rank_choices
from compress.planning.plan import Plan
from compress.planning.prepare import prepare, take_survey
from compress.recipe import Recipe, parse_recipe
from orders import Made, maker, planned, refusal
from recipes import lowrank
from runs import unproved

BLOCKS = 2
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Order:
    """A run under a budget, or of ranks that are spread."""

    model_type: str
    method: str = "lord"
    budget: dict[str, Any] | None = None
    rule: tuple[tuple[str, float], ...] = ()
    allocation: str = "energy"
    form: str = "auto"
    dtype: str = "float16"
    blocks: int = BLOCKS
    more: tuple[tuple[str, Any], ...] = ()

    @property
    def stages(self) -> list[dict[str, Any]]:
        options = {"allocation": self.allocation, "form": self.form, **dict(self.more)}
        return lowrank(self.method, dict(self.rule), **options)

    def recipe(self, source: str) -> Recipe:
        calibration = {"source": source, "samples": 16, "seq_len": 16}
        budget = self.budget and {"trial_samples": 8, **self.budget}
        data = {"method": "test", "stages": self.stages, "budget": budget, "calibration": calibration}
        return parse_recipe(data | {"dtype": self.dtype})


def numbers(tensors: Mapping[str, Tensor]) -> int:
    """Parameters; a tied head is written once, and indices are none."""
    return sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point())


def on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.fixture(scope="module", autouse=True)
def _unproved():
    """That checkpoints reload is proved elsewhere."""
    with unproved():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[Order], Made]:
    return maker(tmp_path_factory)


SHARE, SIZE = {"keep_params": 0.7}, {"target_size": 56_000}
ORDERS = [
    Order("llama", budget=SIZE, allocation="uniform"),
    Order("opt", "anchored", {"target_size": 52_000}, allocation="mixed", more=(("gradient_weight", 0.9),)),
    Order("gpt_bigcode", budget={"target_size": 90_000}, form="pivot", dtype="float32"),
    Order("codegen", "lord", {"keep_params": 0.75}, allocation="fisher", dtype="bfloat16", more=(("multiple", 4),)),
    Order("mixtral", "asvd", {"keep_params": 0.75}, allocation="uniform"),
]
EVERY_ORDER = pytest.mark.parametrize(
    "order", ORDERS, ids=lambda order: f"{order.model_type}-{order.method}-{order.allocation}"
)


def limit_of(run: Made) -> int:
    budget = run.order.budget
    share = budget.get("keep_params")
    return math.floor(share * numbers(run.dense)) if share else int(budget["target_size"])


def came_to(run: Made) -> int:
    return numbers(run.tensors) if "keep_params" in (run.order.budget or {}) else on_disk(run.job.out)


def steps_up(run: Made) -> dict[str, int]:
    """What the next rank, or being dense where there is none, would cost each factorized linear in parameters."""
    found, space = {}, run.plan.ranks
    for linear, ladder in space.targets.items():
        if linear.path in run.result.ranks:
            costs = [space.stage.factor_shape(linear, rank).stored(linear) for rank in ladder]
            place = ladder.index(run.result.ranks[linear.path])
            found[linear.path] = [*costs, linear.m * linear.n][place + 1] - costs[place]
    return found


@EVERY_ORDER
def test_the_promise_is_kept_and_spent(order, made):
    run = made(order)
    limit, spent = limit_of(run), came_to(run)
    assert spent <= limit
    assert run.result.ranks
    if "target_size" in (order.budget or {}):
        # Headers are set aside at more than they take; beside that no step would fit.
        headers = 128 * (len(run.tensors) + BLOCKS + 2) + sum(len(name) for name in run.tensors)
        steps = [ITEMSIZE[order.dtype] * step for step in steps_up(run).values()]
        assert limit - spent < headers + (sum(steps) if order.allocation == "uniform" else min(steps) + 4 * 128)
    elif order.allocation == "uniform":
        # All linears of a kind step together.
        assert limit - spent < max(0.02 * limit, sum(steps_up(run).values()))
    else:
        assert limit - spent < max(0.02 * limit, min(steps_up(run).values()))


@EVERY_ORDER
def test_what_was_chosen_is_what_was_counted_and_written(order, made):
    run = made(order)
    tensors = run.tensors
    assert run.result.size.parameters == numbers(tensors)
    assert run.result.size.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert run.plan.size is None  # decided by the data
    space = run.plan.ranks
    choice = space.choice("any", run.result.ranks)
    assert choice.size == run.result.size
    model = choice.spec.model()
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if "lm_head.weight" not in tensors:
        assert model.config.tie_word_embeddings
        del expected["lm_head.weight"]
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    for path, rank in run.result.ranks.items():
        assert f"{path}.first.weight" in tensors
        assert rank in tensors[f"{path}.first.weight"].shape
        assert rank % space.stage.step == 0


def test_auto_takes_the_trial_with_the_least_divergence(made):
    run = made(AUTO)
    trials = run.facts["trials"]
    assert {trial["allocation"] for trial in trials} == {"energy", "mixed", "fisher"}
    divergences = {trial["allocation"]: trial["divergence"] for trial in trials}
    assert all(0 < divergence < math.inf for divergence in divergences.values())
    found = {choice.counts["allocation"]: choice.counts["ranks"] for choice in allocated(run)}
    best = min(divergences, key=lambda name: divergences[name])
    assert run.result.ranks == found[best]


def allocated(run: Made) -> list[Any]:
    """The three choices, from a survey of its own."""
    job = run.beside("allocated")
    job.partial.mkdir(exist_ok=True)
    prepared = prepare(replace(job, resume=True))
    survey = take_survey(prepared, lambda _step: None)
    return rank_choices(prepared.plan.ranks, job.recipe.budget, prepared.plan.dense, survey.spectra)


@pytest.mark.parametrize(
    ("model_type", "rule", "allocation", "form"),
    [("llama", ("rank_frac", 0.5), "energy", "factors"), ("opt", ("rank", 9), "fisher", "pivot")],
)
def test_spread_ranks_take_no_more_than_uniform_ones(model_type, rule, allocation, form, made):
    order = Order(model_type, rule=(rule,), allocation=allocation, form=form, blocks=1)
    spread, uniform = made(order), made(replace(order, allocation="uniform"))
    assert spread.plan.size is None
    assert uniform.plan.size == uniform.result.size
    assert spread.result.ranks != uniform.result.ranks
    taken, most = spread.result.size.parameters, uniform.result.size.parameters
    assert most - min(steps_up(spread).values()) < taken <= most


def planned_of(order: Order) -> Plan:
    config = tiny.tiny_config(order.model_type, num_hidden_layers=order.blocks)
    return planned(config, order.recipe("stdlib"), getattr(torch, order.dtype))


def some_spectra(space: RankSpace) -> dict[str, Spectrum]:
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Tensor:
        return torch.rand(count, generator=generator).double().sort(descending=True).values

    return {linear.path: Spectrum(draw(linear.full_rank), draw(linear.full_rank)) for linear in space.spec.linears}


def ranks_of(order: Order) -> list[Any]:
    plan = planned_of(order)
    return rank_choices(plan.ranks, order.recipe("stdlib").budget, plan.dense, some_spectra(plan.ranks))


@pytest.mark.parametrize("allocation", ["uniform", "energy"])
@pytest.mark.parametrize(
    ("model_type", "form", "budget"),
    [("llama", "factors", {"keep_params": 0.1}), ("qwen2", "pivot", {"target_size": 15_000})],
)
def test_an_impossible_budget_hears_the_least_possible(model_type, form, budget, allocation):
    order = Order(model_type, budget=budget, allocation=allocation, form=form)
    plan = planned_of(replace(order, budget={"keep_params": 0.9}))
    fault = refusal(lambda: planned_of(order))
    assert fault.count("\n") == 0
    # Rank 1 everywhere, counted on the whole model.
    model = plan.ranks.factorized({linear.path: 1 for linear in plan.ranks.spec.linears}).model()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    least = disk_bytes(model, torch.float16) if "target_size" in budget else parameters
    assert f"is {least:,}. " in fault
    limit = budget.get("target_size") or math.floor(budget["keep_params"] * plan.dense.parameters)
    assert f"The budget of {limit:,} " in fault
    # And that is possible.
    kept = {"target_size": least} if "target_size" in budget else {"keep_params": (least + 0.5) / plan.dense.parameters}
    (choice,) = ranks_of(replace(order, budget=kept))
    assert set(choice.counts["ranks"].values()) == {1}


def test_bytes_on_disk_are_no_less_than_planned_for_a_large_model():
    """Numbers with many digits in the headers, and indices beside the weights."""
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 20, "vocab_size": 128256}
    config = LlamaConfig(**sizes, num_attention_heads=64, num_key_value_heads=8)
    stages = lowrank("svd", {"rank_frac": 0.4}, form="pivot")
    plan = planned(config, parse_recipe({"method": "test", "stages": stages, "calibration": {"source": "stdlib"}}))
    parts: dict[str, dict[str, Any]] = {}
    places = dict[str, int]()
    for name, tensor in plan.spec.model().state_dict().items():
        floating = tensor.is_floating_point()
        part = name.split(".layers.")[1].split(".")[0] if ".layers." in name else name.split(".")[1]
        part = "lm_head" if name.startswith("model.norm") else part
        start = places.get(part, 0)
        places[part] = start + tensor.numel() * (2 if floating else 4)
        entry = {"dtype": "F16" if floating else "I32", "shape": list(tensor.shape)}
        parts.setdefault(part, {"__metadata__": {"format": "pt"}})[name] = entry | {
            "data_offsets": [start, places[part]]
        }
    # What safetensors writes before the tensors of one file: a length, and JSON padded to eights.
    headers = [8 + math.ceil(len(json.dumps(part, separators=(",", ":"))) / 8) * 8 for part in parts.values()]
    assert plan.size.bytes == sum(places.values())
    assert plan.size.bytes + sum(headers) <= plan.spec.disk_bytes


AUTO = Order("llama", "anchored", {"keep_params": 0.75}, allocation="auto", blocks=1, more=(("gradient_weight", 0.9),))


def test_ranks_of_a_result_give_the_same_bytes(made):
    run = made(AUTO)
    facts = run.facts
    factorize = facts["stages"][-1]
    assert factorize["ranks"] == run.result.ranks
    assert factorize["rank_frac"] is None
    data = run.job.recipe.model_dump(mode="json") | {"stages": facts["stages"], "budget": None}
    job = replace(run.beside("again"), recipe=parse_recipe(data))
    plan = pipeline.plan_only(job)
    assert plan.size == run.result.size
    pipeline.run(job)
    first, again = snapshot(run.job.out), snapshot(job.out)
    assert all(again[name] == content for name, content in first.items() if name.endswith("safetensors"))


class Killed(BaseException):
    pass


def forbidden(*_arguments: Any, **_options: Any) -> Any:
    raise AssertionError("this was found already")


def killed_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    calls = itertools.count(1)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise Killed
        return function(*arguments, **options)

    return wrapped


def test_a_killed_run_goes_on_between_trials_to_the_same_bytes(made, monkeypatch):
    run = made(AUTO)
    job = run.beside("killed")
    with monkeypatch.context() as patch:
        patch.setattr(search, "try_out", killed_at(3, search.try_out))
        with pytest.raises(Killed):
            pipeline.run(job)
    assert not job.out.exists()
    monkeypatch.setattr(pipeline, "take_survey", forbidden)
    result = pipeline.run(replace(job, resume=True))
    assert result.ranks == run.result.ranks
    assert snapshot(job.out) == snapshot(run.job.out)
    assert not job.partial.exists()
    assert not any("finding" in name for name in snapshot(job.out))
