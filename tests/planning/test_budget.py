"""A budget is a promise: what is written keeps it, a step more would not, and of what fits the best is chosen."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import tiny
from compress import families
from compress.architectures.architecture import (
    HEADER_BYTES_PER_FILE,
    HEADER_BYTES_PER_TENSOR,
    Architecture,
    ModelSpec,
    Size,
    disk_bytes,
    stored_bytes,
)
from compress.architectures.own import Own
from compress.architectures.stock import Stock
from compress.models.storage import num_parameters
from compress.planning import search
from compress.planning.budget import WidthSpace, plan_stages
from compress.planning.plan import Plan, choose_base, width_space
from compress.planning.search import Cost
from compress.recipe import Recipe, parse_recipe
from orders import Made, maker, planned, refusal
from recipes import anchored, slicegpt
from runs import unproved

Counts = dict[str, int]
METHODS: dict[str, list[dict[str, Any]]] = {
    "shared": anchored({}, units={"neurons": {}}),
    "shared, one group": anchored({}, round_to=8, gradient_weight=0.0, units={"neurons": {}, "kv_groups": {"keep": 1}}),
    "shared, groups open": anchored({}, units={"neurons": {}, "kv_groups": {}}),
    "shared, neurons told": anchored({}, units={"neurons": {"keep": 32}}),
    "shared, width told": anchored({"width": 24}, units={"neurons": {}}),
    "shared, in eights": anchored({}, round_to=8, units={"neurons": {"round_to": 8}}),
    "shared, in sixes": anchored({}, round_to=6, units={"neurons": {}}),
    "per layer, falling": anchored({"linear_ratios": [0.5, 0.1]}, rotation="per-layer", units={"neurons": {}}),
    "shared, blocks open": [{"stage": "drop_blocks"}, *anchored({}, units={"neurons": {}})],
    "blocks alone": [{"stage": "drop_blocks"}, {"stage": "refit"}],
    "slicegpt": slicegpt({}),
    "slicegpt, head": slicegpt({}, slice_head=True),
}


def recipe(method: str, budget: dict[str, Any] | None, *, source: str = "stdlib", **more: Any) -> Recipe:
    calibration = {"source": source, "samples": 8, "seq_len": 16}
    budget = budget and {"trial_samples": 8, **budget}
    return parse_recipe(
        {"method": method, "stages": METHODS[method], "budget": budget, "calibration": calibration, **more}
    )


@dataclass(frozen=True)
class Bill:
    """What the shapes of a recipe cost and what they may, counted on whole models."""

    space: WidthSpace
    budget: Any
    dense_parameters: int

    @property
    def limit(self) -> int:
        return int(self.budget.target_size or math.floor(self.budget.keep_params * self.dense_parameters))

    def cost(self, counts: Counts) -> int:
        model, dtype = self.space.spec(counts).model(), self.space.base.dtype
        return disk_bytes(model, dtype) if self.budget.target_size else num_parameters(model)

    def is_legal(self, counts: Counts) -> bool:
        return not self.space.spec(counts).problems()

    def fits(self, counts: Counts) -> bool:
        return self.cost(counts) <= self.limit

    def one_step_more(self, counts: Counts) -> Iterator[Counts]:
        """The legal shapes that have the next larger count of one kind."""
        for kind, ladder in self.space.ladders.items():
            above = [count for count in ladder if count > counts[kind]]
            if above and self.is_legal(larger := {**counts, kind: above[0]}):
                yield larger


def bill(config: Any, chosen: Recipe, dtype: torch.dtype = torch.float16) -> Bill:
    family = families.find(config)
    base = choose_base(chosen, config, family, dtype)
    stages, _ = plan_stages(chosen.stages, base)
    dense = tiny.tiny_model(config.model_type, num_hidden_layers=config.num_hidden_layers)
    stored = {parameter.data_ptr(): parameter.numel() for parameter in dense.parameters()}  # a tied head once
    return Bill(width_space(chosen, stages, base), chosen.budget, sum(stored.values()))


def whole(counts: Mapping[str, Any]) -> Counts:
    """Counts that are one number for all blocks."""
    assert all(isinstance(count, int) for count in counts.values())
    return dict(counts)


def choices(plan: Plan, space: WidthSpace) -> list[Counts]:
    """Also the one that the plan has made, where there was no other."""
    made = whole({"blocks": plan.spec.num_blocks, "hidden": plan.spec.widths[0] or 0, **plan.spec.units})
    return [whole(choice.label) for choice in plan.choices] or [{kind: made[kind] for kind in space.ladders}]


PLANNED = [
    ("gemma", "shared, neurons told", {"target_size": 60_000}),
    # Of these, heads divide 12 and 24 alone.
    ("llama", "shared, in sixes", {"keep_params": 0.6}),
    ("qwen2", "shared, groups open", {"keep_params": 0.5}),
    ("llama", "shared, blocks open", {"keep_params": 0.6}),
    ("qwen3", "blocks alone", {"keep_params": 0.8}),
]


@pytest.mark.parametrize(("model_type", "method", "budget"), PLANNED)
def test_choices_fit_one_step_more_does_not_and_nothing_is_forgotten(model_type, method, budget):
    blocks = 1 if "groups open" in method else 3
    config, chosen = tiny.tiny_config(model_type, num_hidden_layers=blocks), recipe(method, budget)
    counted = bill(config, chosen)
    found = choices(planned(config, chosen), counted.space)
    for counts in found:
        assert counted.is_legal(counts)
        assert counted.fits(counts)
        for larger in counted.one_step_more(counts):
            assert not counted.fits(larger), (counts, larger)
    for one, other in itertools.permutations(found, 2):
        assert any(one[kind] > other[kind] for kind in one), f"{other} contains {one}"
    # Of a coarse grid, whatever fits is contained in a choice, unless half of the depth that could go is not enough.
    shallowest = min(choice.get("blocks", 0) for choice in found)
    coarse = {kind: ladder[:: max(1, len(ladder) // 4)] for kind, ladder in counted.space.ladders.items()}
    grid = [dict(zip(coarse, values, strict=True)) for values in itertools.product(*coarse.values())]
    grid = [counts for counts in grid if counts.get("blocks", 0) >= shallowest]
    fitting = [counts for counts in grid if counted.is_legal(counts) and counted.fits(counts)]
    assert fitting
    for counts in fitting:
        assert any(all(choice[kind] >= counts[kind] for kind in counts) for choice in found), counts


SHAPES = ["stock", "one basis", "a basis a layer", "a whole head", "falling"]


@pytest.mark.parametrize("model_type", ["llama", "opt", "mixtral"])
def test_a_deep_model_is_counted_by_shallow_ones(model_type):
    config = tiny.tiny_config(model_type, num_hidden_layers=3)
    family = families.find(config)
    for kind in SHAPES[family.stock is None :]:
        shortcuts = kind not in ("stock", "one basis")
        target: Architecture = Own(config, family, shortcuts=shortcuts)
        if kind == "stock":
            target = Stock(config, family, narrows=True)
        dense = ModelSpec.dense(target, torch.float16)
        widths = [24 - (index if kind == "falling" else 0) for index in range(len(dense.points))]
        if kind == "a whole head":
            widths[-1] = tiny.HIDDEN
        spec = replace(dense, widths=tuple(widths), units=dense.dense_units | {"neurons": 40})
        model = spec.model()
        assert spec.size == Size(num_parameters(model), stored_bytes(model, torch.float16)), kind
        assert spec.disk_bytes == disk_bytes(spec.model(), torch.float16), kind


def test_what_stays_stock_is_not_said_to_be_ours():
    config, chosen = tiny.tiny_config("opt"), recipe("shared", {"keep_params": 0.9})
    plan = planned(config, chosen)
    said = {plan.chosen(choice).spec.architecture.is_stock: plan.chosen(choice).notes for choice in plan.choices}
    assert said == {True: [], False: plan.notes}
    assert "our architecture" in plan.notes[0]


@pytest.mark.parametrize(
    ("model_type", "method", "budget"),
    [
        ("llama", "shared, neurons told", {"target_size": 9000}),
        # Below 3 its stream has no direction.
        ("starcoder2", "shared, neurons told", {"keep_params": 0.12}),
        # Of a multiple of 6, the first that 4 divides.
        ("llama", "shared, in sixes", {"keep_params": 0.1}),
    ],
)
def test_an_impossible_budget_hears_the_least_possible(model_type, method, budget):
    config, chosen = tiny.tiny_config(model_type), recipe(method, budget)
    counted = bill(config, chosen)
    lowest = {kind: ladder[:3] for kind, ladder in counted.space.ladders.items()}
    grid = [dict(zip(lowest, values, strict=True)) for values in itertools.product(*lowest.values())]
    least = min(counted.cost(counts) for counts in grid if counted.is_legal(counts))
    assert least > counted.limit
    unit = "bytes" if "target_size" in budget else "parameters"
    assert refusal(lambda: planned(config, chosen)) == (
        f"The budget of {counted.limit:,} {unit} cannot be kept: the least this recipe can come to is {least:,}. "
        "Allow more."
    )


# Shapes of an OPT of 1M parameters at 65% of them: predicted costs of stream and units, and what trials found.
MEASURED = [
    (Cost(0.76216, 0.0), 0.7701),
    (Cost(0.57988, 0.0484), 0.6377),
    (Cost(0.42664, 0.1371), 0.5536),
    (Cost(0.30004, 0.251), 0.5245),
    (Cost(0.19504, 0.4062), 0.572),
    (Cost(0.11076, 0.6233), 0.6837),
    (Cost(0.0454, 0.9519), 0.9179),
    (Cost(0.0, 1.4856), 1.2827),
]


def chosen(costs: Sequence[Cost | None], values: Sequence[float]) -> tuple[int, list[int]]:
    """The place that is chosen, and those that were measured."""
    measured: list[int] = []

    def measure(place: int) -> float:
        measured.append(place)
        return values[place]

    return search.choose(costs, measure), measured


@pytest.mark.parametrize("left", [(0.375, 0.5), (1.0, 1.0), (0.75, 3.0), (3.0, 0.6)])
def test_two_trials_correct_the_prediction_and_the_third_finds_the_best(left):
    """Values that are the predicted costs in other shares than expected."""
    costs = [cost for cost, _ in MEASURED]
    values = [cost.total(left) for cost in costs]
    place, measured = chosen(costs, values)
    assert len(measured) == len(set(measured)) <= search.MOST_TRIALS
    assert place == min(range(len(costs)), key=values.__getitem__)


def test_what_is_predicted_to_be_far_worse_is_not_tried(monkeypatch):
    monkeypatch.setattr(search, "REACH", 2.0)
    assert chosen([Cost(cost / 2, cost / 2) for cost in (3.0, 1.0, 3.0)], [0.0, 1.0, 0.0]) == (1, [1])


@pytest.mark.parametrize(("count", "places"), [(2, [0, 1]), (3, [0, 1, 2]), (6, [1, 2, 3]), (7, [2, 3, 4])])
def test_without_a_prediction_the_middle_is_tried(count, places):
    values = [float(-place) for place in range(count)]
    assert chosen([None] * count, values) == (places[-1], places)


@dataclass(frozen=True)
class Order:
    """A run under a budget: of which model, how, in which dtype."""

    model_type: str
    method: str
    budget: dict[str, Any]
    dtype: str = "float16"
    blocks: int = 2

    @property
    def config(self) -> Any:
        return tiny.tiny_config(self.model_type, num_hidden_layers=self.blocks)

    def recipe(self, source: str) -> Recipe:
        return recipe(self.method, self.budget, source=source, dtype=self.dtype)


ORDERS = [
    Order("llama", "shared, in eights", {"keep_params": 0.6}),
    Order("starcoder2", "shared, one group", {"target_size": 40_000}),
    Order("mistral", "per layer, falling", {"keep_params": 0.6}, "bfloat16"),
    Order("mixtral", "slicegpt, head", {"target_size": 120_000}),
    Order("llama", "shared, blocks open", {"keep_params": 0.6}, blocks=3),
]


def counts_of(run: Made) -> Counts:
    """What came out, of each kind."""
    return whole({"blocks": run.result.num_blocks, "hidden": run.result.widths[0], **run.result.units})


@pytest.fixture(scope="module", autouse=True)
def _unproved():
    """That checkpoints reload is proved elsewhere; on random weights a prediction keeps nothing from being tried."""
    with unproved(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "REACH", 1000.0)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[Order], Made]:
    return maker(tmp_path_factory)


EVERY_ORDER = pytest.mark.parametrize("order", ORDERS, ids=lambda order: f"{order.model_type}-{order.method}")


@EVERY_ORDER
def test_the_promise_is_kept_and_a_step_more_would_break_it(order, made):
    run = made(order)
    counted = bill(order.config, run.job.recipe, getattr(torch, order.dtype))
    counts = {kind: counts_of(run)[kind] for kind in counted.space.ladders}
    larger = [counted.cost(more) for more in counted.one_step_more(counts)]
    written, files = run.tensors, list(run.job.out.glob("*.safetensors"))
    if share := order.budget.get("keep_params"):
        limit = math.floor(share * sum(tensor.numel() for tensor in run.dense.values()))
        assert sum(tensor.numel() for tensor in written.values()) <= limit < min(larger)
    else:
        limit, on_disk = order.budget["target_size"], sum(file.stat().st_size for file in files)
        assert on_disk <= limit < min(larger)
        # No more is set aside for headers than is said.
        headers = sum(len(name) + HEADER_BYTES_PER_TENSOR for name in written) + len(files) * HEADER_BYTES_PER_FILE
        assert on_disk <= counted.cost(counts) <= on_disk + headers


@EVERY_ORDER
def test_what_is_planned_is_what_is_written(order, made):
    run, dtype = made(order), getattr(torch, order.dtype)
    plan, result = run.plan, run.result
    for choice in run.plan.choices:
        if dict(choice.counts) == {kind: counts_of(run)[kind] for kind in choice.counts}:
            plan = run.plan.chosen(choice)
    assert (list(plan.spec.widths), plan.spec.units) == (result.widths, result.units)
    assert (plan.size, plan.dense) == (result.size, result.dense)
    assert plan.dense.parameters == sum(tensor.numel() for tensor in run.dense.values())
    model = replace(plan.spec, widths=tuple(result.widths), units=result.units).model()
    file_name = plan.spec.architecture.layout(dtype).file_name
    expected = {file_name(name): (parameter.shape, dtype) for name, parameter in model.named_parameters()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in run.tensors.items()} == expected
    assert sum(tensor.nbytes for tensor in run.tensors.values()) == result.size.bytes


@EVERY_ORDER
def test_the_trial_with_the_least_divergence_is_chosen(order, made):
    run = made(order)
    trials, choices = run.facts["trials"], [dict(choice.counts) for choice in run.plan.choices]
    if not choices:
        assert trials == []
        return
    divergences = [trial.pop("divergence") for trial in trials]
    predicted = [trial.pop("predicted") for trial in trials]
    assert 1 <= len(trials) <= min(len(choices), search.MOST_TRIALS)
    assert all(0 < divergence < math.inf for divergence in divergences)
    assert None in predicted or predicted[0] == min(predicted)
    best = trials[divergences.index(min(divergences))]
    assert best == {kind: counts_of(run)[kind] for kind in best}
    assert all(trial in choices for trial in trials)
