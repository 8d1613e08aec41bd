"""A budget is a promise: what is written keeps it, a step more would not, and of what fits the best is chosen."""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from compress import families, pipeline, search
from compress.architectures.architecture import Architecture, Shape, dense_units
from compress.architectures.own import Own
from compress.architectures.stock import Stock
from compress.assembly import take_survey
from compress.budget import Space, ladders, legal
from compress.checkpoints.sizes import HEADER_BYTES_PER_FILE, HEADER_BYTES_PER_TENSOR, disk_bytes, size_of
from compress.errors import UsageError
from compress.job import Job
from compress.models.hub import find_model
from compress.needs import Room
from compress.plan import Plan, choose_target, make_plan, model_points
from compress.preflight import prepare
from compress.progress import Steps, silent
from compress.recipe import Recipe, parse_recipe
from compress.search import Cost
from compress.streaming.streams import spread
from recipes import anchored, slicegpt
from runs import tensors_of

Counts = dict[str, int]
METHODS: dict[str, list[dict[str, Any]]] = {
    "shared": anchored({}, units={"neurons": {}}),
    "shared, one group": anchored({}, round_to=8, gradient_weight=0.0, units={"neurons": {}, "kv_groups": {"keep": 1}}),
    "shared, groups open": anchored({}, units={"neurons": {}, "kv_groups": {}}),
    "shared, no refit": anchored({}, refit=False, gradient_weight=0.0, units={"neurons": {}}),
    "shared, neurons told": anchored({}, units={"neurons": {"keep": 32}}),
    "shared, width told": anchored({"width": 24}, units={"neurons": {}}),
    "shared, in eights": anchored({}, round_to=8, units={"neurons": {"round_to": 8}}),
    "shared, in sixes": anchored({}, round_to=6, units={"neurons": {}}),
    "per layer": anchored({}, rotation="per-layer", units={"neurons": {}}),
    "per layer, falling": anchored({"linear_ratios": [0.5, 0.1]}, rotation="per-layer", units={"neurons": {}}),
    "slicegpt": slicegpt({}),
    "slicegpt, head": slicegpt({}, slice_head=True),
}


def recipe(method: str, budget: dict[str, Any] | None, *, source: str = "stdlib", **more: Any) -> Recipe:
    calibration = {"source": source, "samples": 8, "seq_len": 16}
    budget = budget and {"trial_samples": 8, **budget}
    return parse_recipe(
        {"method": method, "stages": METHODS[method], "budget": budget, "calibration": calibration, **more}
    )


# ---- what is planned ----


@dataclass(frozen=True)
class Bill:
    """What the shapes of a recipe cost and what they may, counted on whole models."""

    space: Space
    budget: Any
    dense_parameters: int

    @property
    def limit(self) -> int:
        return int(self.budget.target_size or math.floor(self.budget.keep_params * self.dense_parameters))

    def cost(self, counts: Counts) -> int:
        model = self.space.target.model(self.space.shape(counts))
        if self.budget.target_size:
            return disk_bytes(model, self.space.dtype)
        return size_of(model, self.space.dtype).parameters

    def fits(self, counts: Counts) -> bool:
        return self.cost(counts) <= self.limit

    def one_step_more(self, counts: Counts) -> Iterator[Counts]:
        """The legal shapes that have the next larger count of one kind."""
        for kind, ladder in ladders(self.space).items():
            above = [count for count in ladder if count > counts[kind]]
            if above and legal(self.space, larger := {**counts, kind: above[0]}):
                yield larger


def bill(config: Any, chosen: Recipe, dtype: torch.dtype = torch.float16) -> Bill:
    family = families.find(config)
    target, _ = choose_target(chosen, config, family)
    points, units = model_points(config, family, 0), dense_units(config, family)
    stages = [stage.resolved(target.steps()) for stage in chosen.stages]
    dense = tiny.tiny_model(config.model_type, num_hidden_layers=config.num_hidden_layers)
    stored = {parameter.data_ptr(): parameter.numel() for parameter in dense.parameters()}  # a tied head once
    return Bill(Space(stages, points, units, target, dtype), chosen.budget, sum(stored.values()))


def planned(config: Any, chosen: Recipe, dtype: torch.dtype = torch.float16) -> Plan:
    family = families.find(config)
    return make_plan(chosen, config, family, dtype=dtype, computing=torch.float32, room=Room(1, 2**30))


def whole(counts: Mapping[str, Any]) -> Counts:
    """Counts that are one number for all blocks."""
    assert all(isinstance(count, int) for count in counts.values())
    return dict(counts)


def choices(plan: Plan, space: Space) -> list[Counts]:
    """Also the one that the plan has made, where there was no other."""
    made = whole({"hidden": plan.widths[0] or 0, **plan.units})
    return [whole(choice.counts) for choice in plan.choices] or [{kind: made[kind] for kind in ladders(space)}]


SLOW = pytest.mark.slow
PLANNED = [
    ("llama", "shared", {"keep_params": 0.6}),
    ("phi", "per layer", {"keep_params": 0.85}),
    ("opt", "slicegpt", {"keep_params": 0.8}),
    ("gemma", "shared, neurons told", {"target_size": 60_000}),
    ("phi3", "shared, width told", {"keep_params": 0.7}),
    ("qwen3", "shared, in eights", {"keep_params": 0.6}),
    # Of these, heads divide 12 and 24 alone.
    ("llama", "shared, in sixes", {"keep_params": 0.6}),
    pytest.param("starcoder2", "shared, no refit", {"target_size": 30_000}, marks=SLOW),
    pytest.param("qwen2", "shared, groups open", {"keep_params": 0.5}, marks=SLOW),
    pytest.param("mistral", "per layer, falling", {"keep_params": 0.8}, marks=SLOW),
]


@pytest.mark.parametrize(("model_type", "method", "budget"), PLANNED)
def test_choices_fit_one_step_more_does_not_and_nothing_is_forgotten(model_type, method, budget):
    config, chosen = tiny.tiny_config(model_type), recipe(method, budget)
    counted = bill(config, chosen)
    found = choices(planned(config, chosen), counted.space)
    for counts in found:
        assert legal(counted.space, counts)
        assert counted.fits(counts)
        for larger in counted.one_step_more(counts):
            assert not counted.fits(larger), (counts, larger)
    for one, other in itertools.permutations(found, 2):
        assert any(one[kind] > other[kind] for kind in one), f"{other} contains {one}"
    # Of a coarse grid, whatever fits is contained in a choice.
    coarse = {kind: ladder[:: max(1, len(ladder) // 4)] for kind, ladder in ladders(counted.space).items()}
    grid = [dict(zip(coarse, values, strict=True)) for values in itertools.product(*coarse.values())]
    fitting = [counts for counts in grid if legal(counted.space, counts) and counted.fits(counts)]
    assert fitting
    for counts in fitting:
        assert any(all(choice[kind] >= counts[kind] for kind in counts) for choice in found), counts


def test_choices_say_their_size():
    config, chosen = tiny.tiny_config("llama"), recipe("shared", {"keep_params": 0.6})
    plan, counted = planned(config, chosen), bill(config, chosen)
    widths = [choice.counts["hidden"] for choice in plan.choices]
    assert len(widths) > 2
    assert widths == sorted(set(widths))
    assert (plan.size, plan.removed) == (None, None)
    for choice in plan.choices:
        assert choice.shape == counted.space.shape(choice.counts)
        assert choice.size.parameters == counted.cost(dict(choice.counts))
        assert choice.size.bytes == 2 * choice.size.parameters
        made = plan.chosen(choice)
        assert (made.size, made.choices) == (choice.size, [])
        assert made.widths == [choice.counts["hidden"]] * (2 * tiny.NUM_BLOCKS + 1)
        assert made.units == {"neurons": choice.counts["neurons"], "kv_groups": 2}
        assert not any(stage.opens for stage in made.stages)


def test_widths_come_in_the_multiples_that_are_asked_for():
    chosen = recipe("shared, in eights", {"keep_params": 0.6})
    for model_type in ("llama", "phi3"):
        config = tiny.tiny_config(model_type)
        for counts in choices(planned(config, chosen), bill(config, chosen).space):
            assert counts["hidden"] % 8 == 0
            assert counts["neurons"] % 8 == 0


SHAPES = ["stock", "one basis", "a basis a layer", "a whole head", "falling"]


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize(
    "model_type",
    [name if name in ("llama", "phi", "opt") else pytest.param(name, marks=SLOW) for name in tiny.FAMILIES],
)
def test_a_deep_model_is_counted_by_shallow_ones(model_type, blocks):
    config = tiny.tiny_config(model_type, num_hidden_layers=blocks)
    family = families.find(config)
    points, units = model_points(config, family, 0), dense_units(config, family)
    for kind in SHAPES[family.stock is None :]:
        shortcuts = kind not in ("stock", "one basis")
        target: Architecture = Own(config, family, shortcuts=shortcuts)
        if kind == "stock":
            target = Stock(config, family, narrows=True)
        widths = [24 - (index if kind == "falling" else 0) for index in range(len(points))]
        if kind == "a whole head":
            widths[-1] = tiny.HIDDEN
        space, shape = Space([], points, units, target, torch.float16), Shape(tuple(widths), units | {"neurons": 40})
        whole = target.model(shape)
        assert space.size(shape) == size_of(whole, torch.float16), kind
        assert space.disk_bytes(shape) == disk_bytes(whole, torch.float16), kind


# ---- what is refused ----


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UsageError) as error:
        call()
    return str(error.value)


@pytest.mark.parametrize(
    ("model_type", "method", "budget"),
    [
        ("llama", "shared, in eights", {"keep_params": 0.1}),
        ("llama", "shared, neurons told", {"target_size": 9000}),
        # Below 3 its stream has no direction.
        ("starcoder2", "shared, neurons told", {"keep_params": 0.12}),
        pytest.param("starcoder2", "shared", {"keep_params": 0.1}, marks=SLOW),
        # Of a multiple of 6, the first that 4 divides.
        ("llama", "shared, in sixes", {"keep_params": 0.1}),
        ("llama", "shared, width told", {"keep_params": 0.1}),
        ("phi", "slicegpt", {"keep_params": 0.1}),
    ],
)
def test_an_impossible_budget_hears_the_least_possible(model_type, method, budget):
    config, chosen = tiny.tiny_config(model_type), recipe(method, budget)
    counted = bill(config, chosen)
    lowest = {kind: ladder[:3] for kind, ladder in ladders(counted.space).items()}
    grid = [dict(zip(lowest, values, strict=True)) for values in itertools.product(*lowest.values())]
    least = min(counted.cost(counts) for counts in grid if legal(counted.space, counts))
    assert least > counted.limit
    unit = "bytes" if "target_size" in budget else "parameters"
    assert refusal(lambda: planned(config, chosen)) == (
        f"The budget of {counted.limit:,} {unit} cannot be kept: the least this recipe can come to is {least:,}. "
        "Allow more."
    )


def test_the_least_possible_is_possible():
    config = tiny.tiny_config("starcoder2")
    method = "shared, neurons told"
    fault = refusal(lambda: planned(config, recipe(method, {"target_size": 100})))
    least = int(fault.removesuffix(". Allow more.").split()[-1].replace(",", ""))
    plan = planned(config, recipe(method, {"target_size": least}))
    assert plan.size is not None
    assert plan.size.bytes < least


def test_a_width_that_no_budget_makes_legal():
    """What is wrong is the width, not the budget."""
    chosen = recipe("shared, width told", {"keep_params": 0.8})
    stages = [stage.model_dump() | ({"width": 22} if stage.stage == "slice" else {}) for stage in chosen.stages]
    odd = parse_recipe(chosen.model_dump() | {"stages": stages})
    fault = refusal(lambda: planned(tiny.tiny_config("llama"), odd))
    assert fault.startswith("A hidden size of 22 is no multiple of the 4 attention heads")
    assert fault.endswith("Use --round-to 4.")


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_budget_that_deletes_nothing(model_type):
    """Qwen2's head is tied and counts when it no longer is; even so there is room for all."""
    with pytest.raises(UsageError, match=r"deletes nothing.*\. "):
        planned(tiny.tiny_config(model_type), recipe("shared, in eights", {"target_size": 10**9}))


def test_a_budget_needs_widths_that_are_known_beforehand():
    stages = anchored({"explained_variance": 0.9}, rotation="per-layer", units={"neurons": {}})
    chosen = recipe("per layer", {"keep_params": 0.8}).model_dump() | {"stages": stages}
    assert refusal(lambda: planned(tiny.tiny_config("llama"), parse_recipe(chosen))) == (
        "A budget needs widths that are known beforehand: leave out explained_variance."
    )


def test_open_widths_need_a_budget_and_a_budget_needs_open_widths():
    opened = "is not told how much to keep; give it a ratio, or the recipe a budget"
    assert refusal(lambda: recipe("slicegpt", None)) == f"slice {opened}"
    assert refusal(lambda: recipe("shared, width told", None)) == f"prune_units {opened}"
    told = recipe("slicegpt", {"keep_params": 0.5}).model_dump() | {"stages": slicegpt({"ratio": 0.25})}
    assert refusal(lambda: parse_recipe(told)) == (
        "the recipe has a budget, but every stage says how much it keeps; leave one open"
    )


@pytest.mark.parametrize(
    "budget",
    [{"keep_params": 0.5, "target_size": 1000}, {"trial_samples": 8}, {"keep_params": 1.0}, {"target_size": 0}],
)
def test_a_budget_is_one_limit_in_its_range(budget):
    fault = refusal(lambda: recipe("slicegpt", budget))
    if len(budget) == 2 or "trial_samples" in budget:
        assert fault == "budget: a budget is keep_params or target_size, one of the two"
    else:
        assert fault.startswith(f"budget.{next(iter(budget))}: Input should be ")


# ---- the trials' order ----


# Shapes of an OPT of 1M parameters at 65% of them: the predicted costs of stream and units, and what trials found.
MEASURED = [
    (Cost(1.9054, 0.0), 0.7701),
    (Cost(1.4497, 0.0484), 0.6377),
    (Cost(1.0666, 0.1371), 0.5536),
    (Cost(0.7501, 0.251), 0.5245),
    (Cost(0.4876, 0.4062), 0.572),
    (Cost(0.2769, 0.6233), 0.6837),
    (Cost(0.1135, 0.9519), 0.9179),
    (Cost(0.0, 1.4856), 1.2827),
]


def chosen(costs: Sequence[Cost | None], values: Sequence[float]) -> tuple[int, list[int]]:
    """The place that is chosen, and those that were measured."""
    measured: list[int] = []

    def measure(place: int) -> float:
        measured.append(place)
        return values[place]

    return search.choose(costs, measure), measured


def test_what_was_measured_on_a_trained_model_is_found_again():
    costs, values = zip(*MEASURED, strict=True)
    place, measured = chosen(costs, values)
    assert place == 3
    assert len(measured) <= search.MOST_TRIALS


@pytest.mark.parametrize("left", [(0.15, 0.5), (0.4, 1.0), (0.3, 3.0), (1.2, 0.6)])
def test_two_trials_correct_the_prediction_and_the_third_finds_the_best(left):
    """Values that are the predicted costs in other shares than expected."""
    costs = [cost for cost, _ in MEASURED]
    values = [cost.total(left) for cost in costs]
    place, measured = chosen(costs, values)
    assert len(measured) == len(set(measured)) <= search.MOST_TRIALS
    assert place == min(range(len(costs)), key=values.__getitem__)


def test_what_is_predicted_to_be_far_worse_is_not_tried(monkeypatch):
    monkeypatch.setattr(search, "REACH", 2.0)
    assert chosen([Cost(0.0, cost) for cost in (3.0, 1.0, 3.0)], [0.0, 1.0, 0.0]) == (1, [1])


@pytest.mark.parametrize(("count", "places"), [(2, [0, 1]), (3, [0, 1, 2]), (6, [1, 2, 3]), (7, [2, 3, 4])])
def test_without_a_prediction_the_middle_is_tried(count, places):
    values = [float(-place) for place in range(count)]
    assert chosen([None] * count, values) == (places[-1], places)


def test_windows_of_a_trial_are_spread_over_all():
    windows = torch.arange(20).reshape(10, 2)
    assert spread(windows, 4)[:, 0].tolist() == [0, 4, 10, 14]
    assert torch.equal(spread(windows, 10), windows)
    assert torch.equal(spread(windows, 99), windows)


# ---- what is written ----


@dataclass(frozen=True)
class Order:
    """A run under a budget: of which model, how, in which dtype."""

    model_type: str
    method: str
    budget: dict[str, Any]
    dtype: str = "float16"
    blocks: int = tiny.NUM_BLOCKS

    @property
    def config(self) -> Any:
        return tiny.tiny_config(self.model_type, num_hidden_layers=self.blocks)


QUICK = [
    Order("llama", "shared, in eights", {"keep_params": 0.6}),
    Order("starcoder2", "shared, one group", {"target_size": 40_000}),
    Order("phi", "per layer", {"keep_params": 0.8}),
    Order("opt", "slicegpt", {"keep_params": 0.8}),
    Order("qwen2", "slicegpt, head", {"target_size": 100_000}, "float32"),
]
MANY = [
    *(Order(name, "shared, in eights", {"keep_params": 0.55}, "bfloat16") for name in tiny.FAMILIES),
    *(Order(name, "shared", {"target_size": 45_000}) for name in ("mistral", "phi3", "gemma")),
    *(Order(name, "shared, no refit", {"target_size": 100_000}, "float32") for name in ("opt", "qwen3")),
    *(Order(name, "per layer", {"keep_params": 0.75}, "float32") for name in ("opt", "llama", "starcoder2")),
    *(Order(name, "per layer, falling", {"keep_params": 0.6}) for name in ("mistral", "gemma")),
    *(Order(name, "slicegpt", {"keep_params": 0.85}, "float32") for name in tiny.FAMILIES if name not in tiny.ONE_END),
    *(
        Order(name, "slicegpt, head", {"target_size": 120_000 if name in tiny.SPARSE else 50_000})
        for name in tiny.FAMILIES
    ),
]
# A run that is quickly done, trials and all.
BRIEF = Order("llama", "shared, in eights", {"keep_params": 0.85}, blocks=1)


@dataclass
class Made:
    """
    job: that made it. plan: of that job, before choices are made. dense: the model it was made from.
    """

    order: Order
    job: Job
    plan: Plan
    dense: Path
    result: pipeline.Result

    @property
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((self.job.out / "compress.json").read_text(encoding="utf-8"))
        return facts

    @property
    def tensors(self) -> dict[str, Tensor]:
        return tensors_of(self.job.out)

    @property
    def counts(self) -> Counts:
        """What came out, of each kind."""
        return whole({"hidden": self.result.widths[0], **self.result.units})

    def beside(self, name: str) -> Job:
        """The same job once more."""
        return replace(self.job, out=self.job.out.with_name(name))


def job_of(order: Order, folder: Path) -> Job:
    tiny.write_model(folder / "dense", order.model_type, dtype=torch.float32, num_hidden_layers=order.blocks)
    text = tiny.write_text(folder / "text.txt", lines=60)
    chosen = recipe(order.method, order.budget, source=str(text), dtype=order.dtype)
    return Job(model=find_model(str(folder / "dense")), recipe=chosen, out=folder / "out", command="compress slice")


@pytest.fixture(scope="module", autouse=True)
def _unproved():
    """That checkpoints reload is proved elsewhere; on random weights a prediction keeps nothing from being tried."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "REACH", 1000.0)
        patch.setattr(pipeline, "verify", lambda *_arguments, **_options: 0.0)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[Order], Made]:
    finished: dict[str, Made] = {}

    def make(order: Order) -> Made:
        if str(order) not in finished:
            job = job_of(order, tmp_path_factory.mktemp("budget"))
            plan = pipeline.plan_only(job)
            finished[str(order)] = Made(order, job, plan, job.out.parent / "dense", pipeline.run(job))
        return finished[str(order)]

    return make


ORDERS = [
    pytest.param(order, id=f"{order.model_type}-{order.method}-{order.dtype}", marks=marks)
    for orders, marks in ((QUICK, ()), (MANY, SLOW))
    for order in orders
]


@pytest.mark.parametrize("order", ORDERS)
def test_the_promise_is_kept_and_a_step_more_would_break_it(order, made):
    run = made(order)
    counted = bill(order.config, run.job.recipe, getattr(torch, order.dtype))
    counts = {kind: run.counts[kind] for kind in ladders(counted.space)}
    larger = [counted.cost(more) for more in counted.one_step_more(counts)]
    written, files = run.tensors, list(run.job.out.glob("*.safetensors"))
    if share := order.budget.get("keep_params"):
        limit = math.floor(share * sum(tensor.numel() for tensor in tensors_of(run.dense).values()))
        assert sum(tensor.numel() for tensor in written.values()) <= limit < min(larger)
    else:
        limit, on_disk = order.budget["target_size"], sum(file.stat().st_size for file in files)
        assert on_disk <= limit < min(larger)
        # No more is set aside for headers than is said.
        headers = sum(len(name) + HEADER_BYTES_PER_TENSOR for name in written) + len(files) * HEADER_BYTES_PER_FILE
        assert on_disk <= counted.cost(counts) <= on_disk + headers


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_planned_is_what_is_written(order, made):
    run, dtype = made(order), getattr(torch, order.dtype)
    plan, result = run.plan, run.result
    for choice in run.plan.choices:
        if dict(choice.counts) == {kind: run.counts[kind] for kind in choice.counts}:
            plan = run.plan.chosen(choice)
    assert (plan.widths, plan.units) == (result.widths, result.units)
    assert (plan.size, plan.dense) == (result.size, result.dense)
    assert plan.dense.parameters == sum(tensor.numel() for tensor in tensors_of(run.dense).values())
    model = plan.target.model(Shape(tuple(result.widths), result.units))
    file_name = plan.target.layout(dtype).file_name
    expected = {file_name(name): (parameter.shape, dtype) for name, parameter in model.named_parameters()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in run.tensors.items()} == expected
    assert sum(tensor.nbytes for tensor in run.tensors.values()) == result.size.bytes


@pytest.mark.parametrize("order", ORDERS)
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
    assert best == {kind: run.counts[kind] for kind in best}
    assert all(trial in choices for trial in trials)


def test_a_trial_is_the_whole_walk(made):
    """Its divergence, found again by hand."""
    run = made(QUICK[0])
    prepared = prepare(run.beside("another"))
    survey = take_survey(prepared, lambda _step: None)
    for trial in run.facts["trials"]:
        divergence, _ = trial.pop("divergence"), trial.pop("predicted")
        (choice,) = [choice for choice in prepared.plan.choices if choice.counts == trial]
        assert search.try_out(prepared, choice, survey, Steps(silent, "", 1)).divergence == divergence


# ---- a run that is killed ----


class Killed(BaseException):
    pass


def forbidden(*_arguments: Any, **_options: Any) -> Any:
    raise AssertionError("this was found already")


def killed_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but the process dies at its so-manieth call."""
    calls = itertools.count(1)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise Killed
        return function(*arguments, **options)

    return wrapped


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Where it dies, and what the run that goes on need not do again.
MOMENTS: dict[str, tuple[Any, str, int, list[tuple[Any, str]]]] = {
    "between trials": (search, "try_out", 2, [(pipeline, "take_survey")]),
    "before the first part": (pipeline, "new_walk", 1, [(pipeline, "take_survey"), (search, "try_out")]),
    "after two parts": (pipeline, "_write_part", 3, [(pipeline, "take_survey"), (search, "try_out")]),
}


def test_there_is_something_to_try(made):
    assert len(made(BRIEF).facts["trials"]) == 2


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_without_survey_and_trials(moment, made, monkeypatch):
    run = made(BRIEF)
    job = run.beside(moment)
    module, name, call, found = MOMENTS[moment]
    with monkeypatch.context() as patch:
        patch.setattr(module, name, killed_at(call, getattr(module, name)))
        with pytest.raises(Killed):
            pipeline.run(job)
    assert not job.out.exists()
    findings = [json.loads(line) for line in (job.partial / "journal.jsonl").read_text(encoding="utf-8").splitlines()]
    names = [line["finding"] for line in findings if "finding" in line]
    tried = [name for name in names if name.startswith(pipeline.TRIAL)]
    assert names == ["survey", *tried]
    assert len(tried) == (1 if moment == "between trials" else 2)
    with monkeypatch.context() as patch:
        for module, name in found:
            patch.setattr(module, name, forbidden)
        result = pipeline.run(replace(job, resume=True))
    assert result.resumed_parts == (2 if moment == "after two parts" else 0)
    assert snapshot(job.out) == snapshot(run.job.out)
    assert not job.partial.exists()


def test_killed_before_its_survey_nothing_is_left(made, monkeypatch):
    job = made(BRIEF).beside("killed at once")
    monkeypatch.setattr(pipeline, "take_survey", killed_at(1, take_survey))
    with pytest.raises(Killed):
        pipeline.run(job)
    assert not job.out.exists()
    assert not job.partial.exists()


def test_trials_are_told_of_as_they_come(made):
    run = made(BRIEF)
    job = run.beside("told")
    told: list[tuple[str, str, float, int]] = []
    pipeline.run(job, lambda *progress: told.append(progress))
    trials = [(done, total) for phase, _, done, total in told if phase == "trying shapes"]
    assert sorted({int(done) for done, _ in trials}) == list(range(len(run.facts["trials"]) + 1))
    assert all(done <= total for done, total in trials)
    assert snapshot(job.out) == snapshot(run.job.out)
