"""Ranks under a budget: a promise that is kept, spent to the last step, and found again by a run that was killed."""

import itertools
import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

import tiny
from compress import families, pipeline, ranks, search
from compress.architectures.architecture import Shape
from compress.assembly import take_survey
from compress.checkpoints.sizes import dense_size, disk_bytes, size_of
from compress.errors import UsageError
from compress.job import Job
from compress.models.hub import find_model
from compress.needs import Room
from compress.plan import Plan, make_plan
from compress.preflight import prepare
from compress.ranks import RankSpace, rank_choices, uniform_ranks
from compress.recipe import Recipe, parse_recipe
from compress.streaming.spectra import Spectrum
from compress.streaming.streams import split_windows
from recipes import lowrank
from runs import tensors_of

SLOW = pytest.mark.slow
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


@dataclass
class Made:
    order: Order
    job: Job
    plan: Plan
    result: pipeline.Result

    @property
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((self.job.out / "compress.json").read_text(encoding="utf-8"))
        return facts

    @property
    def tensors(self) -> dict[str, Tensor]:
        return tensors_of(self.job.out)

    @property
    def dense(self) -> dict[str, Tensor]:
        return tensors_of(self.job.out.with_name("dense"))

    def beside(self, name: str) -> Job:
        return replace(self.job, out=self.job.out.with_name(name))


def numbers(tensors: Mapping[str, Tensor]) -> int:
    """Parameters; a tied head is written once, and indices are none."""
    return sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point())


def on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.fixture(scope="module", autouse=True)
def _unproved():
    """That checkpoints reload is proved elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "verify", lambda *_arguments, **_options: 0.0)
        yield


def job_of(order: Order, folder: Path) -> Job:
    tiny.write_model(folder / "dense", order.model_type, dtype=torch.float32, num_hidden_layers=order.blocks)
    text = tiny.write_text(folder / "text.txt", lines=60)
    source = find_model(str(folder / "dense"))
    return Job(model=source, recipe=order.recipe(str(text)), out=folder / "out", command="compress lord")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[Order], Made]:
    finished: dict[str, Made] = {}

    def make(order: Order) -> Made:
        if str(order) not in finished:
            job = job_of(order, tmp_path_factory.mktemp("ranks"))
            plan = pipeline.plan_only(job)
            finished[str(order)] = Made(order, job, plan, pipeline.run(job))
        return finished[str(order)]

    return make


def bytes_of(model_type: str, share: float) -> dict[str, Any]:
    """A size by the dense model's at 16 bits."""
    config = tiny.tiny_config(model_type, num_hidden_layers=BLOCKS)
    return {"target_size": int(share * dense_size(config, torch.float16).bytes)}


SHARE, SIZE = {"keep_params": 0.7}, {"target_size": 56_000}
ORDERS = [
    Order("llama", budget=SHARE, form="factors"),
    Order("llama", budget=SIZE, allocation="uniform"),
    Order("qwen2", "anchored", SHARE, allocation="fisher", dtype="bfloat16"),
    Order("opt", "anchored", {"target_size": 52_000}, allocation="mixed", more=(("gradient_weight", 0.9),)),
    Order("gpt_bigcode", budget={"target_size": 90_000}, dtype="float32"),
    Order("gpt_neox", "svd-llm", SHARE, allocation="uniform", dtype="float32"),
    Order("llama", "anchored", {"keep_params": 0.8}, allocation="auto"),
]
MANY = [
    *(
        Order(name, "lord", budget, allocation=allocation, form=form, dtype=dtype)
        for name in ("llama", "starcoder2", "gemma", "codegen")
        for budget in ({"keep_params": 0.65}, {"keep_params": 0.9}, bytes_of(name, 0.85))
        for allocation, form, dtype in (("energy", "pivot", "float16"), ("uniform", "factors", "bfloat16"))
    ),
    *(Order(name, "anchored", {"keep_params": 0.75}, allocation="auto") for name in tiny.FAMILIES),
    *(Order(name, "asvd", bytes_of(name, 0.85), allocation="uniform") for name in tiny.FAMILIES),
    *(
        Order(name, "lord", {"keep_params": 0.75}, allocation="fisher", more=(("multiple", 4),))
        for name in tiny.FAMILIES
    ),
]
AUTOS = [
    pytest.param(order, id=order.model_type, marks=marks)
    for orders, marks in ((ORDERS, ()), (MANY, SLOW))
    for order in orders
    if order.allocation == "auto"
]
SPENT = [
    pytest.param(order, id=f"{order.model_type}-{order.method}-{order.allocation}-{number}", marks=marks)
    for orders, marks in ((ORDERS, ()), (MANY, SLOW))
    for number, order in enumerate(orders)
]


def limit_of(run: Made) -> int:
    budget = run.order.budget
    assert budget is not None
    share = budget.get("keep_params")
    return math.floor(share * numbers(run.dense)) if share else int(budget["target_size"])


def came_to(run: Made) -> int:
    return numbers(run.tensors) if "keep_params" in (run.order.budget or {}) else on_disk(run.job.out)


def steps_up(run: Made) -> dict[str, int]:
    """What the next rank, or being dense where there is none, would cost each factorised linear in parameters."""
    found, space = {}, run.plan.ranks
    assert space is not None
    for linear, ladder in space.targets.items():
        if linear.path in run.result.ranks:
            costs = [space.stage.factor_shape(linear, rank).stored(linear) for rank in ladder]
            place = ladder.index(run.result.ranks[linear.path])
            found[linear.path] = [*costs, linear.m * linear.n][place + 1] - costs[place]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("order", SPENT)
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


@pytest.mark.parametrize("order", SPENT)
def test_what_was_chosen_is_what_was_counted_and_written(order, made):
    run = made(order)
    tensors = run.tensors
    assert run.result.size.parameters == numbers(tensors)
    assert run.result.size.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert run.plan.size is None  # decided by the data
    space = run.plan.ranks
    assert space is not None
    choice = space.choice("any", run.result.ranks)
    assert choice.size == run.result.size
    model = run.plan.target.model(choice.shape)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if "lm_head.weight" not in tensors:
        assert model.config.tie_word_embeddings
        del expected["lm_head.weight"]
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    for path, rank in run.result.ranks.items():
        assert f"{path}.first.weight" in tensors
        assert rank in tensors[f"{path}.first.weight"].shape
        assert rank % space.stage.step == 0


@pytest.mark.parametrize("order", AUTOS)
def test_auto_takes_the_trial_with_the_least_divergence(order, made):
    run = made(order)
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
    assert survey is not None
    assert prepared.plan.ranks is not None
    return rank_choices(prepared.plan.ranks, job.recipe.budget, prepared.plan.dense, survey.spectra)


# ---- spreading what uniform ranks would take ----


@pytest.mark.slow
@pytest.mark.parametrize("form", ["factors", "pivot"])
@pytest.mark.parametrize("allocation", ["energy", "fisher", pytest.param("mixed", marks=SLOW)])
@pytest.mark.parametrize("rule", [("rank_frac", 0.5), pytest.param(("rank", 9), marks=SLOW)], ids=str)
@pytest.mark.parametrize("model_type", ["llama", pytest.param("opt", marks=SLOW)])
def test_spread_ranks_take_no_more_than_uniform_ones(model_type, rule, allocation, form, made):
    order = Order(model_type, rule=(rule,), allocation=allocation, form=form)
    spread, uniform = made(order), made(replace(order, allocation="uniform"))
    assert spread.plan.size is None
    assert uniform.plan.size == uniform.result.size
    assert spread.result.ranks != uniform.result.ranks
    taken, most = spread.result.size.parameters, uniform.result.size.parameters
    assert most - min(steps_up(spread).values()) < taken <= most


# ---- what is refused ----


def planned(order: Order, **changes: Any) -> Plan:
    config = tiny.tiny_config(order.model_type, num_hidden_layers=order.blocks, **changes)
    family, dtype = families.find(config), getattr(torch, order.dtype)
    recipe = order.recipe("stdlib")
    return make_plan(recipe, config, family, dtype=dtype, computing=torch.float32, room=Room(1, 2**30))


def some_spectra(space: RankSpace) -> dict[str, Spectrum]:
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Tensor:
        return torch.rand(count, generator=generator).double().sort(descending=True).values

    return {linear.path: Spectrum(draw(linear.full_rank), draw(linear.full_rank)) for linear in space.linears}


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UsageError) as error:
        call()
    return str(error.value)


def ranks_of(order: Order) -> list[Any]:
    plan = planned(order)
    assert plan.ranks is not None
    return rank_choices(plan.ranks, order.recipe("stdlib").budget, plan.dense, some_spectra(plan.ranks))


@pytest.mark.parametrize("allocation", ["uniform", "energy"])
@pytest.mark.parametrize(
    ("model_type", "form", "budget"),
    [
        ("llama", "factors", {"keep_params": 0.1}),
        ("qwen2", "pivot", {"target_size": 15_000}),
        ("gpt_bigcode", "pivot", {"keep_params": 0.2}),
    ],
)
def test_an_impossible_budget_hears_the_least_possible(model_type, form, budget, allocation):
    order = Order(model_type, budget=budget, allocation=allocation, form=form)
    plan = planned(replace(order, budget={"keep_params": 0.9}))
    assert plan.ranks is not None
    fault = refusal(lambda: planned(order))
    assert fault.count("\n") == 0
    # Rank 1 everywhere, counted on the whole model.
    shape = plan.ranks.shaped({linear.path: 1 for linear in plan.ranks.linears})
    model = plan.target.model(shape)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    least = disk_bytes(model, torch.float16) if "target_size" in budget else parameters
    assert f"is {least:,}. " in fault
    limit = budget.get("target_size") or math.floor(budget["keep_params"] * plan.dense.parameters)
    assert f"The budget of {limit:,} " in fault
    # And that is possible.
    kept = {"target_size": least} if "target_size" in budget else {"keep_params": (least + 0.5) / plan.dense.parameters}
    (choice,) = ranks_of(replace(order, budget=kept))
    assert set(choice.counts["ranks"].values()) == {1}


@pytest.mark.parametrize("allocation", ["uniform", "energy"])
def test_a_budget_that_holds_the_whole_model_is_refused(allocation):
    """Else a dense copy is written, and nothing is said."""
    order = Order("llama", budget={"target_size": 10**9}, allocation=allocation)
    assert refusal(lambda: planned(order)) == ("The budget deletes nothing: the whole model fits under it. Allow less.")


def test_a_budget_is_no_promise_of_what_is_multiplied_out():
    """A stock model of the old size saves nothing."""
    assert refusal(lambda: planned(Order("llama", budget=SHARE, form="dense"))) == (
        "Multiplied out, the model keeps its size: a budget cannot be kept. Give --rank-frac or --rank."
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["factors", "pivot"])
@pytest.mark.parametrize("rounding", [pytest.param(1, marks=SLOW), 4])
@pytest.mark.parametrize("share", [0.9, pytest.param(0.95, marks=SLOW)])
@pytest.mark.parametrize("unit", ["parameters", "bytes"])
def test_whatever_the_share_the_promise_is_kept(unit, share, rounding, form):
    """Of drawn spectra; counted on whole models."""
    for model_type, method in (("llama", "lord"), ("qwen2", "svd")):
        order = Order(model_type, method, more=(("multiple", rounding),), form=form, budget={"keep_params": 0.9})
        dense = planned(order).dense
        budget = {"keep_params": share} if unit == "parameters" else {"target_size": int(share * dense.bytes)}
        for allocation in ("uniform", "energy"):
            chosen = replace(order, budget=budget, allocation=allocation)
            plan = planned(chosen)
            (choice,) = ranks_of(chosen)
            model = plan.target.model(choice.shape)
            spent = sum(parameter.numel() for parameter in model.parameters())
            limit = math.floor(share * dense.parameters)
            if unit == "bytes":
                spent, limit = disk_bytes(model, torch.float16), budget["target_size"]
            assert spent <= limit
            assert all(rank % rounding == 0 for rank in choice.counts["ranks"].values())
            for path, factors in choice.shape.factors.items():
                linear = next(linear for linear in plan.ranks.linears if linear.path == path)
                assert factors.stored(linear) < linear.m * linear.n


@pytest.mark.parametrize("share", [0.99, 0.999])
@pytest.mark.parametrize("allocation", ["uniform", "energy"])
def test_ranks_near_the_whole_model_are_found_at_once(allocation, share, monkeypatch):
    """Every look is at a whole model, which takes seconds where it is large."""
    order = Order("llama", allocation=allocation, budget={"keep_params": share})
    looks: list[int] = []
    measured = size_of

    def counting(*given: Any) -> Any:
        looks.append(1)
        return measured(*given)

    monkeypatch.setattr(ranks, "size_of", counting)
    (choice,) = ranks_of(order)
    assert share - 0.05 < choice.size.parameters / planned(order).dense.parameters <= share
    assert len(looks) <= 12


def test_uniform_is_the_largest_share_that_all_can_have():
    """The next share at which any linear would get more is too much."""
    order = Order("llama", budget={"keep_params": 0.6}, allocation="uniform")
    plan = planned(order)
    space = plan.ranks
    assert space is not None
    prices = {
        linear: [*(space.stage.factor_shape(linear, rank).stored(linear) for rank in ladder), linear.m * linear.n]
        for linear, ladder in space.targets.items()
    }

    def bought(share: float) -> dict[str, int]:
        """The dearest place within the share, by search from above; the cheapest at least."""
        return {
            linear.path: max([place for place, cost in enumerate(costs) if cost <= share * costs[-1]], default=0)
            for linear, costs in prices.items()
        }

    def cost(share: float) -> int:
        places = bought(share)
        return sum(costs[places[linear.path]] for linear, costs in prices.items())

    shares = sorted({cost / costs[-1] for costs in prices.values() for cost in costs})
    for total in range(cost(0), cost(1.0) + 2000, 3989):
        best = max((share for share in [0.0, *shares] if cost(share * (1 + 1e-12)) <= total), default=0.0)
        expected = {
            linear.path: space.targets[linear][place]
            for linear in prices
            if (place := bought(best * (1 + 1e-12))[linear.path]) < len(space.targets[linear])
        }
        assert uniform_ranks(space.targets, prices, total) == expected
    assert uniform_ranks(space.targets, prices, cost(0) - 1) is None


# ---- bytes on disk of a large model ----


def header_bytes(tensors: Mapping[str, tuple[str, Sequence[int], int]]) -> int:
    """What safetensors writes before the tensors of one file: a length, and JSON padded to eights."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    return 8 + math.ceil(len(json.dumps(header, separators=(",", ":"))) / 8) * 8


def test_headers_are_as_safetensors_writes_them(tmp_path):
    tensors = {"a.weight": torch.zeros(3, 5).half(), "order": torch.arange(7, dtype=torch.int32)}
    save_file(tensors, tmp_path / "file.safetensors", metadata={"format": "pt"})
    (length,) = struct.unpack("<Q", (tmp_path / "file.safetensors").read_bytes()[:8])
    told = {"order": ("I32", [7], 28), "a.weight": ("F16", [3, 5], 30)}
    assert header_bytes(told) == 8 + length


@pytest.mark.slow
@pytest.mark.parametrize("form", ["factors", "pivot"])
@pytest.mark.parametrize("blocks", [2, 80])
def test_bytes_on_disk_are_no_less_than_planned_for_a_large_model(blocks, form):
    """Numbers with many digits in the headers, and indices beside the weights."""
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=blocks,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    recipe = parse_recipe(
        {
            "method": "test",
            "stages": lowrank("svd", {"rank_frac": 0.4}, form=form),
            "calibration": {"source": "stdlib"},
        }
    )
    family = families.find(config)
    plan = make_plan(recipe, config, family, dtype=torch.float16, computing=torch.float32, room=Room(1, 2**30))
    model = plan.target.model(Shape(plan.shape.widths, plan.units, plan.factors))
    parts: dict[str, dict[str, tuple[str, Sequence[int], int]]] = {}
    total = 0
    for name, tensor in model.state_dict().items():
        size = tensor.numel() * (2 if tensor.is_floating_point() else 4)
        part = name.split(".layers.")[1].split(".")[0] if ".layers." in name else name.split(".")[1]
        if name.startswith("model.norm"):
            part = "lm_head"
        kind = "F16" if tensor.is_floating_point() else "I32"
        parts.setdefault(part, {})[name] = (kind, tensor.shape, size)
        total += size
    assert plan.size is not None
    assert plan.size.bytes == total
    assert total + sum(map(header_bytes, parts.values())) <= disk_bytes(model, torch.float16)


# ---- the same again ----


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


AUTO = Order("llama", "anchored", {"keep_params": 0.75}, allocation="auto", blocks=1, more=(("gradient_weight", 0.9),))
SPREAD = Order("llama", "lord", allocation="fisher", rule=(("rank_frac", 0.5),), blocks=1)


@pytest.mark.slow
@pytest.mark.parametrize("order", [AUTO, SPREAD], ids=["auto", "spread"])
def test_ranks_of_a_result_give_the_same_bytes(order, made):
    run = made(order)
    facts = run.facts
    factorize = facts["stages"][-1]
    assert factorize["ranks"] == run.result.ranks
    assert factorize["rank_frac"] is None
    data = run.job.recipe.model_dump(mode="json") | {"stages": facts["stages"], "budget": None}
    job = replace(run.beside("again"), recipe=parse_recipe(data))
    plan = pipeline.plan_only(job)
    assert plan.size == run.result.size
    pipeline.run(job)
    assert {name: content for name, content in snapshot(job.out).items() if name.endswith("safetensors")} == {
        name: content for name, content in snapshot(run.job.out).items() if name.endswith("safetensors")
    }


def test_the_walk_has_windows_held_out_as_it_is_told(made):
    """What a run fits on and what it holds out, from its recipe."""
    recipe = made(AUTO).job.recipe
    assert recipe.held_out_windows == 2
    windows = torch.zeros(16, 16, dtype=torch.int64)
    assert sum(len(batch.ids) for batch in split_windows(windows, 4, recipe.held_out_windows) if batch.held_out) == 2


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


# Where it dies, and what the run that goes on need not do again.
MOMENTS: dict[str, tuple[Any, str, int, list[tuple[Any, str]]]] = {
    "after the survey": (search, "try_out", 1, [(pipeline, "take_survey")]),
    "between trials": (search, "try_out", 3, [(pipeline, "take_survey")]),
    "before the first part": (pipeline, "new_walk", 1, [(pipeline, "take_survey"), (search, "try_out")]),
    "after one part": (pipeline, "_write_part", 2, [(pipeline, "take_survey"), (search, "try_out")]),
    "after two parts": (pipeline, "_write_part", 3, [(pipeline, "take_survey"), (search, "try_out")]),
    "when all is written": (pipeline, "_complete", 1, [(pipeline, "take_survey"), (search, "try_out")]),
}


def kill(job: Job, moment: str) -> None:
    module, name, call, _ = MOMENTS[moment]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, killed_at(call, getattr(module, name)))
        with pytest.raises(Killed):
            pipeline.run(job)
    assert not job.out.exists()


AT_ONCE = ("between trials", "after one part")


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment", [moment if moment in AT_ONCE else pytest.param(moment, marks=SLOW) for moment in MOMENTS]
)
@pytest.mark.parametrize("order", [AUTO, SPREAD], ids=["auto", "spread"])
def test_a_killed_run_goes_on_to_the_same_bytes(order, moment, made, monkeypatch):
    if order is SPREAD and MOMENTS[moment][1] == "try_out":
        return
    run = made(order)
    job = run.beside(f"killed {moment}")
    kill(job, moment)
    for module, name in MOMENTS[moment][3]:
        monkeypatch.setattr(module, name, forbidden)
    result = pipeline.run(replace(job, resume=True))
    assert result.ranks == run.result.ranks
    assert snapshot(job.out) == snapshot(run.job.out)
    assert not job.partial.exists()
    assert not any("finding" in name for name in snapshot(job.out))


FINDINGS = ["finding-survey.safetensors", "finding-gradients-00000.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["changed", pytest.param("gone", marks=SLOW)])
@pytest.mark.parametrize("file", FINDINGS)
def test_a_finding_that_is_damaged_is_found_again(file, damage, made, monkeypatch):
    """And what came of it is not gone on from."""
    run = made(AUTO)
    job = run.beside(f"damaged {file} {damage}")
    kill(job, "after two parts")
    path = job.partial / file
    if damage == "gone":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
    surveys: list[Any] = []
    taken = take_survey
    monkeypatch.setattr(pipeline, "take_survey", lambda *given: surveys.append(taken(*given)) or surveys[-1])
    result = pipeline.run(replace(job, resume=True))
    assert len(surveys) == 1
    assert result.resumed_parts == 0
    assert snapshot(job.out) == snapshot(run.job.out)


def test_trials_and_parts_are_told_as_they_come(made):
    run = made(AUTO)
    told: list[tuple[str, str, float, int]] = []
    pipeline.run(run.beside("told"), lambda *progress: told.append(progress))
    phases = dict.fromkeys(phase for phase, _, _, _ in told)
    assert list(phases) == ["surveying the dense model", "trying shapes", "compressing", "verifying"]
    survey = [entry[1:] for entry in told if entry[0] == "surveying the dense model"]
    ways = ["embeddings", "block 0", "head", "block 0, backward", ""]
    assert survey == [(step, number, 4) for number, step in enumerate(ways)]
    trials = [(step, done, total) for phase, step, done, total in told if phase == "trying shapes"]
    assert trials[:3] == [("embeddings", 0, 3), ("block 0", pytest.approx(1 / 3), 3), ("head", pytest.approx(2 / 3), 3)]
    assert [done for _, done, _ in trials] == sorted(done for _, done, _ in trials)
    assert trials[-1][1:] == (3, 3)
    parts = [entry[1:] for entry in told if entry[0] == "compressing"]
    assert parts == [("embeddings", 0, 3), ("block 0", 1, 3), ("head", 2, 3), ("", 3, 3)]
