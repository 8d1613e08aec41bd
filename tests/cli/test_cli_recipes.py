"""What a command line means: the recipe that it shows, what --set reaches, and what is refused. Nothing is run."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cli_runner import flat, invoke, succeeds
from compress import presets
from compress.recipe import as_yaml, parse_recipe
from tiny import write_model, write_text


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    write_model(home / "llama", "llama", dtype=torch.float32, num_hidden_layers=2)
    write_text(home / "text.txt", lines=60)
    return home


def words(home: Path, line: str) -> list[object]:
    text = [] if line.startswith("run ") else ["--calib", home / "text.txt", "--samples", 8, "--seq-len", 32]
    return [*line.split(), "--model", home / "llama", *text]


def shown(home: Path, line: str) -> dict[str, Any]:
    """The recipe, its stages by their names."""
    found: dict[str, Any] = yaml.safe_load(succeeds(*words(home, line), "--show-recipe").out)
    return found


def stages(home: Path, line: str) -> dict[str, dict[str, Any]]:
    return {stage["stage"]: stage for stage in shown(home, line)["stages"]}


def differs(stage: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    return {name: stage.get(name) for name, value in expected.items() if stage.get(name) != value}


# Of each command line the stages in their order, and of some of these what they say.
RECIPES: dict[str, tuple[list[str], dict[str, dict[str, Any]]]] = {
    "slice --drop-blocks 2 --seed 7 --dtype bfloat16": (["drop_blocks", "refit"], {"drop_blocks": {"count": 2}}),
    "slice --target-size 60kB --drop-blocks 0": (["fold_norms", "rotate_shared", "slice", "refit", "prune_units"], {}),
    "auto --target-size 100kB": (
        ["drop_blocks", "refit", "slim", "quantize_embeddings"],
        {"drop_blocks": {"count": None}},
    ),
    "auto --target-size 100kB --for vllm --drop-blocks 1": (
        ["drop_blocks", "refit", "slim"],
        {"drop_blocks": {"count": 1}},
    ),
    "auto --target-size 100kB --drop-blocks 0": (["refit", "slim", "quantize_embeddings"], {}),
    "auto --frontier 90kB:110kB": (["refit", "slim", "quantize_embeddings"], {}),
    "slice --keep-params 0.75": (
        ["drop_blocks", "fold_norms", "rotate_shared", "slice", "refit", "prune_units"],
        {"rotate_shared": {"gradient_weight": 0.9}, "slice": {"slice_head": True, "ratio": None}},
    ),
    "slice --ratio 0.25 --mlp-ratio 0.5 --no-refit --measure-error": (
        ["fold_norms", "measure_error", "rotate_shared", "slice", "prune_units"],
        {"prune_units": {"units": "neurons", "ratio": 0.5}},
    ),
    "slice --ratio 0.1:0.3 --rotation per-layer --kv-ratio 0.5": (
        ["fold_norms", "rotate", "slice", "refit", "prune_units"],
        {
            "rotate": {"signal": "normed", "stream": "dense"},
            "slice": {"linear_ratios": [0.1, 0.3]},
            "prune_units": {"units": "kv_groups", "ratio": 0.5},
        },
    ),
    "slice --method slicegpt --ratio 0.5,0,0.25 --round-to 4": (
        ["fold_norms", "rotate", "slice"],
        {
            "rotate": {"signal": "stream", "stream": "compressed", "final_orientation": "pca"},
            "slice": {"block_ratios": [0.5, 0.0, 0.25], "slice_head": False, "round_to": 4},
        },
    ),
    "lord --keep-params 0.8": (
        ["refit", "factorize"],
        {"factorize": {"method": "anchored", "allocation": "fisher", "gradient_weight": 0.9, "rank_frac": None}},
    ),
    "slim": (
        ["refit", "slim"],
        {
            "slim": {
                "prune": {"method": "admm", "pattern": "2:4", "iterations": 48},
                "quantize": {
                    **{"method": "gptq", "num_bits": 4, "type": "int", "symmetric": True},
                    **{"actorder": "weight", "important_inputs": False},
                },
                "adapt": {"method": "whitened", "rank": 0.1, "rounds": 2, "group_size": 128},
                **{"polish": 2, "center": True, "form": "packed", "target": ["all"]},
            }
        },
    ),
    "slim --fast --sparsity 50% --adapter-rank 64 --no-refit": (
        ["slim"],
        {
            "slim": {
                "prune": {"method": "admm", "pattern": "50%", "iterations": 20},
                "adapt": {"method": "whitened", "rank": 64, "rounds": 1, "group_size": 128},
            }
        },
    ),
    "slim --method slim --bits fp8 --inputs fp8 --group channel": (
        ["slim"],
        {
            "slim": {
                "input_activations": "fp8",
                "quantize": {
                    **{"method": "mse", "num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
                    **{"actorder": "weight", "important_inputs": False},
                },
            }
        },
    ),
    "quantize --bits 3 --group 16 --act-order --asymmetric --materialize": (
        ["refit", "slim"],
        {
            "slim": {
                **{"prune": None, "adapt": None, "polish": 3, "form": "dense"},
                "quantize": {
                    **{
                        "method": "gptq",
                        "num_bits": 3,
                        "type": "int",
                        "strategy": "group",
                        "group_size": 16,
                        "symmetric": False,
                    },
                    **{"actorder": "weight", "important_inputs": False},
                },
            }
        },
    ),
}


@pytest.mark.parametrize("line", RECIPES)
def test_the_recipe_of_a_command(home, line, tmp_path):
    """And `compress run` of it, with no option at all, has the same: and a recipe determines the output."""
    text = succeeds(*words(home, line), "--show-recipe").out
    found, (names, expected) = {stage["stage"]: stage for stage in yaml.safe_load(text)["stages"]}, RECIPES[line]
    assert list(found) == names
    assert {name: differs(found[name], fields) for name, fields in expected.items()} == {name: {} for name in expected}
    (tmp_path / "mine.yaml").write_text(text)
    assert succeeds("run", tmp_path / "mine.yaml", "--model", home / "llama", "--show-recipe").out == text


@pytest.mark.parametrize(
    ("line", "symmetric", "actorder"),
    [
        ("quantize --bits 2", False, "weight"),
        ("quantize --bits 4", True, "weight"),
        ("quantize --bits 3 --no-asymmetric --no-act-order", True, "none"),
        ("quantize --bits 3 --compact", True, "weight"),
        ("quantize --bits 3 --set slim.form=compact", True, "weight"),
        ("quantize --bits 3 --head-bits 8", True, "weight"),
        ("slim --bits 3", True, "weight"),
    ],
)
def test_few_packed_bits_have_zero_points_by_default(home, line, symmetric, actorder):
    (stage,) = (each for each in shown(home, line)["stages"] if each["stage"] == "slim")
    assert (stage["quantize"]["symmetric"], stage["quantize"]["actorder"]) == (symmetric, actorder)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("slice --method slicegpt --ratio 0.1:0.3", "slicegpt-0.1-0.3"),
        ("slice --method slicegpt --explained-variance 0.99", "slicegpt-ev0.99"),
        ("lord --target-size 90kB", "lord-anchored-90kB"),
        ("lord --rank-frac 0.5", "lord-anchored-rf0.5"),
        ("slim", "slim-anchored-w4-2-4-r0.1"),
        ("slim --sparsity none --bits fp8", "slim-anchored-wfp8-r0.1"),
        ("quantize --bits nvfp4", "quantize-wnvfp4"),
        ("slim --sparsity 50% --adapter-rank 0", "slim-anchored-w4-50pc"),
        ("quantize --set slim.quantize.num_bits=3", "quantize-w3"),
    ],
)
def test_the_default_output(home, line, name):
    assert succeeds(*words(home, line), "--dry-run", "--json").json["out"] == f"compressed/llama-{name}"


SETTINGS = {
    "slim --compact --set slim.adapt.num_bits=4": ("slim", "adapt.num_bits", 4),
    'lord --rank 8 --set factorize.target=["mlp"]': ("factorize", "target", ["mlp"]),
    "slice --ratio 0.25 --set refit.held_out=0.25 --set refit.damping=0.5": ("refit", "damping", 0.5),
    "slice --ratio 0.25 --mlp-ratio 0.5 --kv-ratio 0.5 --set stages.5.round_to=1": ("prune_units", "round_to", 1),
}


@pytest.mark.parametrize("line", SETTINGS)
def test_set_reaches_a_field_of_a_stage(home, line):
    stage, address, expected = SETTINGS[line]
    found: Any = stages(home, line)[stage]
    for field in address.split("."):
        found = found[field]
    assert found == expected


@pytest.mark.parametrize(
    ("line", "faults"),
    [
        (
            "slim --set slimm.polish=3",
            ["--set slimm.polish=3: Unknown stage 'slimm'. Did you mean 'slim'? Available: budget, "],
        ),
        ("slim --set slim.polishes=3", ["--set slim.polishes=3: Unknown key 'polishes'. Did you mean 'polish'?"]),
        (
            "slim --set slim.quantized.bits=3",
            ["--set slim.quantized.bits=3: Unknown key 'quantized'. Did you mean 'quantize'?"],
        ),
        ("slim --set slim.polish=many", ["--set slim.polish=many: Input should be a valid integer"]),
        ("slim --set slim.polish", ["--set slim.polish: write STAGE.FIELD=VALUE, such as"]),
        ("slim --set stages.7.polish=3", ["--set stages.7.polish=3: the recipe has 2 stages, counted from 0."]),
        (
            "slim --bits 3 --set slim.quantize.num_bits=4",
            ["--bits 3 and --set slim.quantize.num_bits=4 both set slim.quantize.num_bits. Leave one out."],
        ),
        (
            "slice --ratio 0.25 --mlp-ratio 0.5 --kv-ratio 0.5 --set prune_units.round_to=8",
            ["the recipe has 2 stages 'prune_units'. Name one by its place: stages.4 or stages.5."],
        ),
        ("slim --set x.y=1 --set slim.z --dtype int8", ["--set x.y=1: Unknown stage 'x'", "--set slim.z: write"]),
    ],
)
def test_what_cannot_be_set(home, line, faults):
    ran = invoke(*words(home, line), "--dry-run")
    assert ran.code == 2
    assert len(ran.faults) == len(faults), ran.faults
    assert all(said in fault for said, fault in zip(faults, ran.faults, strict=True)), ran.faults


# What is refused. The rules are the stages' own; a fault begins with the flag that it is about.

REFUSED = {
    "slice": "by one of --ratio 0.25, --drop-blocks 4, --keep-params 0.75, --target-size 4GB, "
    "--explained-variance 0.99; got 0.",
    "slice --ratio 0.25 --keep-params 0.5": "got 2.",
    "slice --ratio 2": "--ratio 2: Input should be less than 1",
    "slice --ratio 0.1:0.2:0.3": "--ratio 0.1:0.2:0.3: ",
    "slice --ratio 0.1:0.3": "Give one ratio for all blocks, or use --rotation per-layer",
    "slice --ratio 0.25 --round-to 7": "no multiple of the 4 attention heads",
    "slice --ratio 0.25 --set rotate_shared.gradient_weight=1": "gradient_weight=1: Input should be less than 1",
    "slice --ratio 0.25 --allocation free": "--allocation free has no effect with --ratio 0.25. Leave one out.",
    "slice --keep-params 0.5 --allocation free --mlp-ratio 0.5": "leave out prune_units' ratio (--mlp-ratio)",
    "slice --target-size much": "--target-size takes a size such as 8GB",
    "slice --target-size 0": "--target-size 0: Input should be greater than or equal to 1",
    "slice --method slicegpt --ratio 0.25 --no-refit": "--refit is an option of --method anchored, not of slicegpt",
    "lord --target-size 50MB": "The budget deletes nothing",
    "lord --rank-frac 0.5 --target experts": "No linear matches the target 'experts'",
    "lord --rank-frac 0.5 --method lord --set factorize.gradient_weight=0.5": "gradient_weight is of method anchored",
    "lord --keep-params 0.8 --method lord --allocation auto": "allocation auto compares by trial, which lord cannot",
    "lord --rank-frac 0.5 --method asvd --bias": "factorize: asvd adds no bias",
    "lord --rank-frac 0.5 --materialize --form factors": "--form factors and --materialize both set factorize.form.",
    "lord --rank-frac 0.5 --materialize --bias": "has no room for added biases",
    "lord --keep-params 0.8 --materialize": "a budget cannot be kept",
    "lord --rank-frac 0.9 --form factors": "No linear would be smaller in factors of these ranks",
    "lord --rank-frac 0.5 --method lord --measure-error": "goes by the dense model's inputs",
    "slim --bits 1": "--bits 1: Input should be greater than or equal to 2",
    "slim --sparsity 2:2": "--sparsity 2:2: a pattern is keep:group such as 2:4",
    "slim --sparsity 3:5": "3:5 takes inputs in groups of 5, but self_attn.q_proj has 32",
    "slim --group rows": "--group rows: Input should be 'tensor', 'channel', 'group', 'tensor_group' or 'block'",
    "slim --group 24": "A scale takes inputs in groups of 24, but self_attn.q_proj has 32",
    "slim --adapter-rank 1.5": "--adapter-rank 1.5: a rank is a share of the full one below 1, or a whole number",
    "slim --bits none --sparsity none": "slim needs prune or quantize; give it one",
    "slim --compact --materialize": "--compact and --materialize both set slim.form. Leave one out.",
    "slim --method slim --fast": "--fast is an option of --method anchored",
    "slim --adapter-rank 0 --set slim.adapt.num_bits=4": "slim.adapt.num_bits=4 has no effect with --adapter-rank 0.",
    "slim --bits none --group 16": "--group 16 has no effect with --bits none. Leave one out.",
    "slim --inputs int8 --bits fp8": "input_activations int8 does not fit the weights; it is int8 beside integers",
    "slim --inputs int8 --compact": "goes with packed form, not compact; leave it out or take packed",
    "slim --compact --bits fp8": "compact form holds integers, not fp8, nvfp4 or mxfp4; take integers or packed form",
    "quantize --bits mxfp4": "but mlp.down_proj has 48. Leave it out with --target, or take other --bits.",
    "quantize --bits nvfp4 --group 32": "--bits nvfp4 and --group 32 both set slim.quantize.strategy. Leave one out.",
    "quantize --set slim.quantize.type=float": "floats have 8 bits (fp8), or 4 in groups of 16 (nvfp4)",
    "quantize --set slim.quantize.bits=4": "slim.quantize.bits=4: 'bits' is now num_bits.",
    "quantize --set slim.inputs=fp8": "'inputs' is now input_activations.",
    "quantize --set slim.quantize.act_order=true": "'act_order' is now actorder: weight.",
    "slim --set slim.adapt.group=64": "'group' is now group_size, and strategy for tensor, channel or block.",
    "quantize --group channel --set slim.quantize.group_size=64": "strategy group and a group_size go together; got",
    "slim --compact --asymmetric": "leave asymmetric out or take packed form",
    "slim --set slim.quantize.important_inputs=true": "important_inputs has no room in packed form",
    "slim --set slim.adapt.num_bits=4": "adapters in few bits are for compact form; leave their num_bits out",
    "quantize --method mse --act-order": "--act-order is an option of --method gptq, not of mse. Leave it out.",
    "slim --method slim --asymmetric": "slim looks for symmetric grids of integers; take absmax",
    "slim --bits fp8 --asymmetric": "fp8 is symmetric; leave asymmetric out",
    "slim --target experts": "No linear matches the target 'experts'. There are mlp.down_proj",
    "run slicegpt --samples 0": "--samples 0: Input should be greater than or equal to 1",
    "run nothing": "Unknown recipe 'nothing'",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_refused(home, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = invoke(*words(home, line), "--dry-run")
    assert ran.code == 2
    assert len(ran.faults) == 1, ran.faults
    assert ran.err == f"error: {ran.faults[0]}\n"
    assert REFUSED[line] in ran.faults[0]


def test_all_faults_at_once(home, tmp_path, monkeypatch):
    """Of the options first; of what they mean for the model, the output and the text together."""
    monkeypatch.chdir(tmp_path)
    ran = invoke(*words(home, "slim --bits 9 --sparsity 2:2 --dtype int8 --cache-memory much --device gpu"))
    assert ran.code == 2
    flags = [fault.partition(" ")[0] for fault in ran.faults]
    assert flags == ["--cache-memory", "--sparsity", "--bits", "--dtype", "--device"]
    (tmp_path / "out").mkdir()
    line = f"slim --sparsity 3:5 --group 24 --target mlp,experts --out out --calib {home / 'text.txt'} --seq-len 100"
    ran = invoke(*line.split(), "--model", home / "llama", "--samples", 8)
    assert ran.code == 2
    for word in ("3:5", "groups of 24", "'experts'", "--overwrite", "--seq-len 64"):
        assert word in "\n".join(ran.faults)
    assert len(ran.faults) == 5


def test_a_recipe_without_calibration_takes_what_is_usual(home, tmp_path):
    (tmp_path / "r.yaml").write_text("stages:\n  - stage: slim\n    quantize: {num_bits: 4, strategy: channel}\n")
    text = succeeds("run", tmp_path / "r.yaml", "--model", home / "llama", "--show-recipe").out
    recipe = parse_recipe(yaml.safe_load(text))
    assert (recipe.method, recipe.calibration.source, recipe.calibration.samples) == ("r", "wikitext2", 128)
    assert as_yaml(recipe) == text


def test_faults_say_the_line(home, tmp_path):
    text = "method: x\nstages:\n  - stage: slim\n    quantize:\n      num_bitz: 4\n      num_bits: 99\nseeed: 3\n"
    (tmp_path / "bad.yaml").write_text(text)
    refused = invoke("run", tmp_path / "bad.yaml", "--model", home / "llama", "--set", "slim.polish=-1")
    assert refused.code == 2
    assert refused.err.splitlines() == [
        "error: bad.yaml:6: stages.0.quantize.num_bits: Input should be less than or equal to 8",
        "error: bad.yaml:5: stages.0.quantize.num_bitz: Unknown key 'num_bitz'. Did you mean 'num_bits'? Available: "
        "actorder, engine, gguf_type, group_size, important_inputs, method, num_bits, strategy, symmetric, type, "
        "types.",
        "error: --set slim.polish=-1: Input should be greater than or equal to 0",
        "error: bad.yaml:7: seeed: Unknown key 'seeed'. Did you mean 'seed'? Available: "
        "budget, calibration, dtype, method, seed, stages.",
    ]


BOMB = "".join(f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in pairwise("abcdefghi"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + BOMB, "has more than 10,000 values"),
        ("a: &a [*a]\n", "bad.yaml"),
        ("method: a\nmethod: b\n", "method is there twice"),
        ("- a\n", "is no mapping"),
        ("method: a\n", "stages"),
    ],
)
def test_a_recipe_that_is_none_is_refused_in_a_line(content, said, home, tmp_path):
    (tmp_path / "bad.yaml").write_text(content)
    for more in ([], ["--set", "slim.polish=1", "--samples", 8]):
        refused = invoke("run", tmp_path / "bad.yaml", "--model", home / "llama", *more)
        assert refused.code == 2
        assert refused.faults
        assert said in refused.err or more


@pytest.mark.parametrize("spoiled", ["4", True])
def test_a_batch_size_that_is_no_number_is_refused(spoiled, home, tmp_path):
    text = {"source": str(home / "text.txt"), "samples": 8, "seq_len": 32}
    stages = [{"stage": "slim", "quantize": {"num_bits": 4, "strategy": "channel"}}]
    recipe = {"method": "slim", "stages": stages, "calibration": text}
    facts = {"recipe": recipe, "base_model": str(home / "llama"), "batch_size": spoiled}
    (tmp_path / "compress.json").write_text(json.dumps(facts))
    (fault,) = invoke("run", tmp_path, "--dry-run").faults
    assert fault.endswith(f"has the batch_size {spoiled!r}, which is not a number of sequences. Say --batch-size.")
    assert succeeds("run", tmp_path, "--batch-size", 4, "--dry-run", "--json").json["dense"]


FOLD, SHARED = {"stage": "fold_norms"}, {"stage": "rotate_shared"}
SLICE, SLIM = {"stage": "slice", "ratio": 0.25}, {"stage": "slim", "quantize": {"num_bits": 4, "strategy": "channel"}}
FACTORS = {"stage": "factorize", "method": "anchored", "rank_frac": 0.5}
FEWER = {"stage": "prune_units", "units": "neurons", "ratio": 0.25}


@pytest.mark.parametrize(
    ("stages", "more", "said"),
    [
        ([SLIM, FACTORS], {}, "so factorize has to come before it"),
        ([SLIM, SLIM], {}, "is there twice"),
        ([FOLD, SHARED, SLICE, {"stage": "refit"}, FEWER, SLIM], {}, "prune_units"),
        ([FOLD, SHARED, {"stage": "slice"}, SLIM], {"budget": {"keep_params": 0.8}}, "budget"),
        ([{"stage": "factorize", "method": "lord", "rank_frac": 0.5}, SLIM], {}, "goes by the dense model's inputs"),
        ([FOLD, {"stage": "rotate"}, {"stage": "slice", "explained_variance": 0.9}, SLIM], {}, "known beforehand"),
    ],
)
def test_stages_that_do_not_go_together(stages, more, said, home, tmp_path):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({"method": "x", "stages": stages, **more}))
    refused = invoke(*words(home, f"run {tmp_path / 'bad.yaml'}"), "--dry-run")
    assert refused.code == 2
    assert said in flat(refused.err)


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_can_be_planned(home, name):
    size = (
        ["--set", "budget.target_size=100000"] if name.startswith("auto") else []
    )  # a shipped one is a larger model's
    text = f"--calib {home / 'text.txt'} --samples 8 --seq-len 32"
    plan = succeeds(*words(home, f"run {name} {text}"), *size, "--dry-run", "--json")
    assert plan.json["dense"]["parameters"] > 0
