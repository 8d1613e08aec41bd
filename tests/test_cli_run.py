"""`compress run`: the shipped recipes, a recipe's way through --show-recipe and compress.json, and what is refused."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml

import compress
from cli_runner import flat, invoke, snapshot, succeeds
from compress.recipe import parse_recipe
from compress.recipe_file import as_yaml, comparison, read_recipe
from oracles import logits_of, random_ids
from tiny import write_model, write_text

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
SHORT = ["--samples", 12, "--seq-len", 32]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    for kind in ("llama", "opt"):
        write_model(home / kind, kind, dtype=torch.float32, num_hidden_layers=2)
    write_text(home / "text.txt", lines=60)
    return home


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to work in. No GPU is seen, and what is written is not reloaded in a process of its own."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("compress.pipeline.verify", lambda *_arguments, **_options: 0.0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(home: Path, recipe: Path, kind: str = "llama", *more: object) -> list[object]:
    return ["run", recipe, "--model", home / kind, "--calib", home / "text.txt", *SHORT, *more]


def weights(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))}


@pytest.mark.parametrize("kind", ["llama", "opt"])
@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_shipped_recipe_runs_and_its_result_computes(file, kind, home, place):
    more = ["--batch-size", 4] if kind == "opt" else []
    said = succeeds(*words(home, file, kind, "--out", "out", "--json", *more)).json
    if file.stem not in ("slim", "slicegpt"):  # a tiny model's adapters and shortcuts are large
        assert said["bytes"] < said["dense_bytes"]
    logits = logits_of(compress.load(place / "out"), random_ids(1, 16))
    assert torch.isfinite(logits).all()
    measured = succeeds("eval", "--ppl", home / "text.txt", "--model", "out", "--seq-len", 32, "--limit", 4, "--json")
    assert 1 < measured.json["perplexity"][0]["ppl"] < 10**4
    assert json.loads((place / "out" / "compress.json").read_text())["recipe"]["method"] == said_method(file)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slice-then-slim", "lord-then-slim", "slice-lord-slim"])
def test_several_stages_at_once_reload_in_a_clean_process(name, home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (file,) = (file for file in CONFIGS if file.stem == name)
    said = succeeds(*words(home, file, "llama", "--json")).json
    assert said["reload_difference"] < 1e-4
    assert said["held_out_divergence"] > 0


def said_method(file: Path) -> str:
    method: str = yaml.safe_load(file.read_text())["method"]
    return method


COMMANDS = {
    "slice": ["slice", "--ratio", "0.25", "--slice-head", "--method", "slicegpt"],
    "anchored": ["slice", "--keep-params", "0.8", "--trial-samples", 8],
    "lord": ["lord", "--rank-frac", "0.5", "--method", "lord"],
    "slim": ["slim", "--bits", "3", "--fast"],
    "compact": ["slim", "--method", "slim", "--compact"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_command_shows_as_its_recipe_gives_the_same_weights(name, home, place):
    command = [*COMMANDS[name], "--model", home / "llama", "--calib", home / "text.txt", *SHORT]
    shown = succeeds(*command, "--show-recipe")
    assert not list(place.iterdir())
    (place / "mine.yaml").write_text(shown.out)
    succeeds(*command, "--out", "by-command")
    succeeds("run", "mine.yaml", "--model", home / "llama", "--out", "by-recipe")
    assert weights(place / "by-command") == weights(place / "by-recipe")
    recipes = [json.loads((place / out / "compress.json").read_text())["recipe"] for out in ("by-command", "by-recipe")]
    assert recipes[0] == recipes[1]


@pytest.mark.parametrize("name", ["slice", "slim"])
def test_a_checkpoints_own_recipe_gives_the_same_bytes(name, home, place):
    succeeds(*COMMANDS[name], "--model", home / "llama", "--calib", home / "text.txt", *SHORT, "--out", "first")
    ran = succeeds("run", "first/compress.json", "--model", home / "llama", "--out", "second")
    assert "The same bytes as those of the checkpoint" in flat(ran.out)
    assert snapshot(place / "first") == snapshot(place / "second")
    other = succeeds("run", "first", "--model", home / "llama", "--out", "third", "--seed", 1, "--samples", 10)
    assert "unlike in calibration text, recipe" in flat(other.out)


@pytest.mark.parametrize("spoiled", ["4", 0, True, 1.5, [8]])
def test_windows_at_a_time_that_are_no_number_are_refused(spoiled, home, place):
    text = {"source": str(home / "text.txt"), "samples": 8, "seq_len": 32}
    stages = [{"stage": "slim", "quantize": {"bits": 4, "group": "channel"}}]
    recipe = {"method": "slim", "stages": stages, "calibration": text}
    facts = {"recipe": recipe, "base_model": str(home / "llama"), "batch_size": spoiled}
    (place / "compress.json").write_text(json.dumps(facts))
    refused = invoke("run", "compress.json", "--dry-run")
    assert refused.code == 2
    assert refused.faults == [
        f"compress.json has the batch_size {spoiled!r}, which is no number of windows. Say --batch-size."
    ]
    assert succeeds("run", "compress.json", "--batch-size", 4, "--dry-run", "--json").json["dense"]


def test_other_facts_that_are_no_mappings_make_the_runs_unlike():
    spoiled = {"parts": {}, "tuning": 3, "fingerprints": [1]}
    second = {
        "parts": {"a": "b"},
        "fingerprints": {"calibration text": "1"},
        "recipe": {},
        "versions": {},
        "device": "cpu",
    }
    assert "unlike in calibration text, recipe" in comparison(spoiled, second)


def test_a_checkpoint_of_a_local_model_does_not_know_where_that_lies(home, place):
    shutil.copytree(home / "llama", place / "mine")
    succeeds("slice", "--ratio", "0.25", "--model", "mine", "--calib", home / "text.txt", *SHORT, "--out", "first")
    shutil.rmtree(place / "mine")
    refused = invoke("run", "first", "--out", "second")
    assert refused.code in (2, 4)
    assert "mine" in refused.err
    assert "Traceback" not in refused.err


def test_a_recipe_without_calibration_takes_what_is_usual(home, place):
    (place / "r.yaml").write_text("stages:\n  - stage: slim\n    quantize: {bits: 4, group: channel}\n")
    shown = succeeds("run", "r.yaml", "--model", home / "llama", "--show-recipe").out
    recipe = parse_recipe(yaml.safe_load(shown))
    assert (recipe.method, recipe.calibration.source, recipe.calibration.samples) == ("r", "wikitext2", 128)
    assert as_yaml(recipe) == shown


def test_a_plan_is_shown_and_nothing_written(home, place):
    said = succeeds(*words(home, CONFIGS[0], "llama", "--dry-run", "--json")).json
    assert said["dense"]["parameters"] > 0
    assert not list(place.iterdir())


def test_faults_say_the_line(home, place):
    text = "method: x\nstages:\n  - stage: slim\n    quantize:\n      bitz: 4\n      bits: 99\nseeed: 3\n"
    (place / "bad.yaml").write_text(text)
    refused = invoke(*words(home, Path("bad.yaml")))
    assert refused.code == 2
    assert refused.err.splitlines() == [
        "error: bad.yaml:6: stages.0.quantize.bits: Input should be less than or equal to 8",
        "error: bad.yaml:5: stages.0.quantize.bitz: Unknown key 'bitz'. Did you mean 'bits'? Available: "
        "act_order, bits, floating, group, important_inputs, method, symmetric.",
        "error: bad.yaml:7: seeed: Unknown key 'seeed'. Did you mean 'seed'? Available: "
        "budget, calibration, dtype, method, seed, stages.",
    ]


BOMB = "".join(f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in pairwise("abcdefghi"))


@pytest.mark.parametrize(
    ("content", "words_"),
    [
        ("a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + BOMB, "has more than 10,000 values"),
        ("a: &a [*a]\n", "bad.yaml"),
        ("method: a\nmethod: b\n", "method is there twice"),
        ("[" * 5000, "cannot be read"),
        ("method: a\n", "stages"),
        ("stages: []\ncalibration: 3\n", "calibration"),
    ],
)
def test_a_recipe_that_is_none_is_refused_in_a_line(content, words_, home, place):
    (place / "bad.yaml").write_text(content)
    refused = invoke(*words(home, Path("bad.yaml")))
    assert refused.code == 2
    assert words_ in refused.err
    assert "Traceback" not in refused.err


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"recipe": 3}', '{"recipe": {}, "base_model": 3}'])
def test_a_compress_json_that_is_none_is_refused(content, place):
    (place / "compress.json").write_text(content)
    refused = invoke("run", "compress.json")
    assert refused.code == 2
    assert refused.err.startswith("error: ")
    assert "Traceback" not in refused.err


FOLD, SHARED = {"stage": "fold_norms"}, {"stage": "rotate_shared"}
SLICE, SLIM = {"stage": "slice", "ratio": 0.25}, {"stage": "slim", "quantize": {"bits": 4, "group": "channel"}}
FACTORS = {"stage": "factorize", "method": "anchored", "rank_frac": 0.5}


@pytest.mark.parametrize(
    ("stages", "more", "words_"),
    [
        ([SLIM, FACTORS], {}, "so factorize has to come before it"),
        ([SLIM, SLIM], {}, "is there twice"),
        (
            [
                FOLD,
                SHARED,
                SLICE,
                {"stage": "refit"},
                {"stage": "prune_units", "units": "neurons", "ratio": 0.25},
                SLIM,
            ],
            {},
            "prune_units",
        ),
        ([FOLD, SHARED, {"stage": "slice"}, SLIM], {"budget": {"keep_params": 0.8}}, "budget"),
        ([{"stage": "factorize", "method": "lord", "rank_frac": 0.5}, SLIM], {}, "goes by the dense model's inputs"),
        ([FOLD, {"stage": "rotate"}, {"stage": "slice", "explained_variance": 0.9}, SLIM], {}, "known beforehand"),
    ],
)
def test_stages_that_do_not_go_together(stages, more, words_, home, place):
    (place / "bad.yaml").write_text(yaml.safe_dump({"method": "x", "stages": stages, **more}))
    refused = invoke(*words(home, Path("bad.yaml")))
    assert refused.code == 2
    assert words_ in flat(refused.err)
    assert not [name for name in place.iterdir() if name.name != "bad.yaml"]


def test_read_recipe_knows_where_everything_is(tmp_path):
    (tmp_path / "r.yaml").write_text("method: a\nstages:\n  - stage: slice\n    ratio: 0.1\n  - stage: refit\n")
    file = read_recipe(tmp_path / "r.yaml")
    assert file.place(("stages", 0, "ratio")) == "r.yaml:4: stages.0.ratio"
    assert file.place(("stages", 1, "method")) == "r.yaml:5: stages.1.method"
    assert file.place(()) == "r.yaml"


def test_a_result_is_pushed_once_it_is_finished(home, place, monkeypatch):
    pushed: list[tuple[Path, str, bool]] = []

    def push(folder: Path, repository: str) -> str:
        pushed.append((folder, repository, (folder / "compress.json").is_file()))
        return "https://hub/me/small"

    monkeypatch.setattr("compress.checkpoints.push.push", push)
    command = ["slice", "--ratio", "0.25", "--model", home / "llama", "--calib", home / "text.txt", *SHORT]
    ran = succeeds(*command, "--out", "out", "--push-to-hub", "me/small")
    assert pushed == [(Path("out"), "me/small", True)]
    assert "pushed to https://hub/me/small" in flat(ran.out)


def test_a_repository_that_cannot_be_is_refused_before_the_run(home, place):
    refused = invoke(*words(home, CONFIGS[0], "llama", "--push-to-hub", "a/b/c"))
    assert refused.code == 2
    assert "'a/b/c'" in refused.err
    assert not list(place.iterdir())
