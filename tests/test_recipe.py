"""Recipes: what is accepted, what is refused and how, and that the shipped ones are good."""

from pathlib import Path

import pytest
import yaml

from compress import presets
from compress.errors import UsageError
from compress.recipe import parse_recipe, read_recipe
from recipes import slicegpt

FOLD, ROTATE, SLICE = {"stage": "fold_norms"}, {"stage": "rotate"}, {"stage": "slice", "ratio": 0.25}


def data(**changes):
    return {"method": "mine", "stages": [FOLD, ROTATE, SLICE], "calibration": {"source": "c4"}} | changes


def faults(recipe) -> list[str]:
    with pytest.raises(UsageError) as error:
        parse_recipe(recipe)
    return str(error.value).splitlines()


@pytest.mark.parametrize(
    "rule",
    [{"ratio": 0.25}, {"block_ratios": [0.1, 0.2]}, {"linear_ratios": [0.1, 0.3]}, {"explained_variance": 0.99}],
    ids=lambda rule: next(iter(rule)),
)
def test_a_dumped_recipe_parses_back(rule):
    """What compress.json holds is the recipe, to the last number."""
    stages = slicegpt(rule, signal="normed", final_orientation="random", round_to=3, slice_head=True)
    recipe = parse_recipe(data(stages=stages, seed=7, dtype="bfloat16"))
    dumped = recipe.model_dump(mode="json")
    assert parse_recipe(dumped) == recipe
    assert parse_recipe(yaml.safe_load(yaml.safe_dump(dumped))) == recipe


@pytest.mark.parametrize(
    ("stages", "needs"),
    [
        ([ROTATE, FOLD, SLICE], "rotate needs fold_norms before it; the order is rotate, fold_norms, slice"),
        (
            [FOLD, SLICE, ROTATE],
            "slice needs rotate or rotate_shared before it; the order is fold_norms, slice, rotate",
        ),
        ([SLICE], "slice needs rotate or rotate_shared before it; the order is slice"),
        ([FOLD, SLICE], "slice needs rotate or rotate_shared before it"),
    ],
)
def test_the_order_of_stages(stages, needs):
    (fault,) = faults(data(stages=stages))
    assert needs in fault


@pytest.mark.parametrize(
    ("changes", "place", "words"),
    [
        ({"stages": []}, "", "at least one stage"),
        ({"stages": "slice"}, "stages", "is a list"),
        ({"stages": ["slice"]}, "stages", "Unknown stage"),
        ({"stages": [FOLD, {"stage": "rotat"}, SLICE]}, "stages", "Unknown stage 'rotat'. Did you mean 'rotate'?"),
        ({"dtype": "floot16"}, "dtype", "Unknown dtype 'floot16'. Did you mean 'float16'?"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"calibration": {"source": "c4", "samples": 0}}, "calibration.samples", "greater than or equal to 1"),
        ({"calibration": {"source": "c4", "seq_len": 1}}, "calibration.seq_len", "greater than or equal to 2"),
        ({"calibration": {}}, "calibration.source", "required"),
        ({"callibration": {}}, "callibration", "Unknown key 'callibration'. Did you mean 'calibration'?"),
        ({"stages": [FOLD, ROTATE, {"stage": "slice"}]}, "slice", "give it a ratio, or the recipe a budget"),
        ({"budget": {"keep_params": 0.5}}, "the recipe has a budget", "leave one open"),
        ({"budget": {}}, "budget", "target_size or target_latency, one of them"),
        ({"budget": {"keep_params": 0.5, "target_size": 9}}, "budget", "target_size or target_latency, one of them"),
        ({"budget": {"keep_params": 1}}, "budget.keep_params", "less than 1"),
        ({"budget": {"keep_params": 0.5, "trial_seconds": 9}}, "budget", "say how many there are at most"),
        ({"stages": [FOLD, ROTATE, SLICE | {"explained_variance": 0.9}]}, "stages", "got ratio, explained_variance"),
        ({"stages": [FOLD, ROTATE, {"stage": "slice", "ratio": 1.5}]}, "stages", "less than 1"),
        ({"stages": [FOLD, ROTATE, SLICE | {"round_to": 0}]}, "stages", "greater than or equal to 1"),
        ({"stages": [FOLD, {"stage": "rotate", "signal": "norm"}, SLICE]}, "stages", "'stream' or 'normed'"),
        ({"stages": [FOLD, ROTATE, SLICE | {"ratios": 1}]}, "stages", "Did you mean 'ratio'?"),
    ],
)
def test_each_fault_is_one_line_that_says_where(changes, place, words):
    (fault,) = faults(data(**changes))
    assert fault.startswith(place)
    assert words in fault


def test_all_faults_at_once():
    stages = [
        FOLD,
        {"stage": "rotate", "signal": "norm"},
        {"stage": "slice", "ratio": 2, "round_to": 0},
        {"stage": "x"},
    ]
    found = faults(data(stages=stages, seed=-1, dtype="int4", calibration={"samples": 0}, extra=1))
    places = ["stages.1.signal", "stages.2.ratio", "stages.2.round_to", "stages.3", "seed", "dtype"]
    places += ["calibration.source", "calibration.samples", "extra"]
    assert sorted(fault.split(": ")[0] for fault in found) == sorted(places)


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_parses_and_is_found_by_its_name(name):
    recipe = parse_recipe(presets.load(name))
    assert recipe.method
    assert read_recipe(Path(name)).data == presets.load(name)
    # Comments say what it is for.
    assert presets.path_of(name).read_text(encoding="utf-8").startswith("#")


def test_the_preset_slicegpt_is_the_papers():
    shipped = parse_recipe(presets.load("slicegpt"))
    assert list(shipped.stages) == list(parse_recipe(data(stages=slicegpt({"ratio": 0.25}))).stages)
    assert shipped.calibration.source == "wikitext2"


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_a_fault(number):
    stages = [{"stage": "slim", "adapt": {"rank": number}}]
    with pytest.raises(UsageError, match="finite"):
        parse_recipe({"method": "x", "stages": stages, "calibration": {"source": "stdlib"}})
