"""`compress slice` by the anchored method, as a user types it: shapes, budgets, exports, what does not go together."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from cli_runner import flat, invoke, succeeds
from test_cli import LLAMA_2_7B
from tiny import write_model, write_text

LAYERS = 3


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    for kind in ("llama", "opt"):
        write_model(home / kind, kind, dtype=torch.float32)
    write_text(home / "text.txt", lines=60)
    (home / "7b").mkdir()
    (home / "7b" / "config.json").write_text(json.dumps(LLAMA_2_7B))
    return home


@pytest.fixture
def place(home, tmp_path, monkeypatch):
    """An empty folder to work in. No GPU is seen, and what is written is not reloaded in a process of its own."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("compress.pipeline.verify", lambda *_arguments, **_options: 0.0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(home, kind: str, *more: object) -> list[object]:
    text = ["--calib", home / "text.txt", "--samples", 8, "--seq-len", 32]
    return ["slice", "--model", home / kind, *text, *more]


def test_the_default_is_a_stock_model(home, place):
    said = succeeds(*words(home, "llama", "--ratio", 0.25, "--json")).json
    assert said["out"] == "compressed/llama-anchored-0.25"
    assert said["architecture"] == "LlamaForCausalLM"
    assert said["loads_without_our_code"] is True
    assert said["widths"] == [24] * (1 + 2 * LAYERS)
    assert said["units"] == {"kv_groups": 2, "neurons": 48}
    assert said["held_out_divergence"] > 0
    model = AutoModelForCausalLM.from_pretrained(place / said["out"])
    assert type(model).__name__ == "LlamaForCausalLM"
    assert sum(parameter.numel() for parameter in model.parameters()) == said["parameters"]
    card = (place / said["out"] / "README.md").read_text()
    assert "a standard `LlamaForCausalLM` checkpoint" in card
    assert "import compress" not in card


def test_opt_keeps_our_architecture_and_says_why(home, place):
    ran = succeeds(*words(home, "opt", "--ratio", 0.25))
    assert "CompressForCausalLM (ours, its code is carried along)" in flat(ran.out)
    assert "opt ties the heads' size to the hidden one" in flat(ran.out)
    config = json.loads((place / "compressed" / "opt-anchored-0.25" / "config.json").read_text())
    assert config["slicing"]["shortcuts"] is False
    assert not any("shortcut" in name for name in tensors(place / "compressed" / "opt-anchored-0.25"))


def tensors(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def test_units_are_deleted_as_asked(home, place):
    said = succeeds(*words(home, "llama", "--ratio", 0.25, "--mlp-ratio", 0.5, "--kv-ratio", 0.5, "--json")).json
    assert said["units"] == {"kv_groups": 1, "neurons": 24}
    config = json.loads((place / said["out"] / "config.json").read_text())
    assert (config["intermediate_size"], config["num_key_value_heads"], config["num_attention_heads"]) == (24, 1, 2)
    assert config["head_dim"] == 8


def test_a_budget_is_kept_and_its_trials_are_told(home, place):
    said = succeeds(*words(home, "llama", "--keep-params", 0.7, "--trial-samples", 8, "--json")).json
    assert said["parameters"] <= 0.7 * said["dense_parameters"]
    trials = json.loads((place / said["out"] / "compress.json").read_text())["trials"]
    best = min(trials, key=lambda trial: trial["divergence"])
    assert (best["hidden"], best["neurons"]) == (said["widths"][0], said["units"]["neurons"])
    assert len(trials) > 1


def test_a_size_on_disk_is_kept(home, place):
    said = succeeds(*words(home, "llama", "--target-size", "60kB", "--trial-samples", 8, "--json")).json
    assert said["out"] == "compressed/llama-anchored-60kB"
    written = sum(file.stat().st_size for file in (place / said["out"]).glob("*.safetensors"))
    assert 0.9 * 60_000 < written <= 60_000


def test_the_plan_of_a_budget_needs_no_weights(home, place):
    table = flat(succeeds(*words(home, "llama", "--keep-params", 0.75, "--dry-run")).out)
    assert "LlamaForCausalLM (stock: no code of ours)" in table
    assert "shapes that fit" in table
    plan = succeeds("slice", "--model", home / "7b", "--keep-params", 0.75, "--dry-run", "--json").json
    for choice in plan["choices"]:
        assert choice["hidden"] % 128 == 0
        assert choice["neurons"] % 128 == 0
        assert choice["parameters"] <= 0.75 * plan["dense"]["parameters"]
        assert choice["bytes"] == 2 * choice["parameters"]
    assert plan["notes"] == []
    assert not list(place.iterdir())


def test_small_models_are_told_that_kernels_want_more(home, place):
    assert "would be too coarse for this model" in flat(
        succeeds(*words(home, "llama", "--ratio", 0.25, "--dry-run")).out
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ratio", 0.25, "--slice-head"], "--slice-head is an option of --method slicegpt, not of anchored"),
        (["--ratio", 0.25, "--signal", "normed"], "--signal is an option of --method slicegpt"),
        (
            ["--ratio", 0.25, "--method", "slicegpt", "--no-refit"],
            "--refit is an option of --method anchored, not of slicegpt",
        ),
        (["--ratio", 0.25, "--keep-params", 0.5], "got 2 of them"),
        ([], "got 0 of them"),
        (["--keep-params", 1.5], "--keep-params is a share above 0 and below 1, got 1.5"),
        (["--keep-params", 0.01], "cannot be kept: the least this recipe can come to is"),
        (["--target-size", "much"], "--target-size takes a size such as 8GB"),
        (["--target-size", "0"], "--target-size is a size above 0"),
        (["--ratio", 0.25, "--mlp-ratio", 1], "--mlp-ratio is a share above 0 and below 1, got 1.0"),
        (["--ratio", 0.25, "--gradient-weight", 1], "--gradient-weight is from 0 up to below 1, got 1.0"),
        (["--ratio", "0.1:0.3"], "Give one ratio for all blocks, or use --rotation per-layer"),
        (["--ratio", 0.25, "--round-to", 7], "no multiple of the 4 attention heads"),
    ],
)
def test_what_does_not_go_together(home, place, options, said):
    ran = invoke(*words(home, "llama", *options))
    assert ran.code == 2
    assert any(said in fault for fault in ran.faults), ran.faults
    assert not list(place.iterdir())


def test_gguf_lies_beside_the_checkpoint_and_reads_back(home, place):
    pytest.importorskip("gguf")
    said = succeeds(*words(home, "llama", "--ratio", 0.25, "--export", "gguf", "--out", "out", "--json")).json
    assert any("bias" in note for note in said["notes"])
    assert (place / "out" / "out.gguf").stat().st_size > said["bytes"]


def test_gguf_of_another_architecture_is_refused_at_once(home, place):
    pytest.importorskip("gguf")
    ran = invoke(*words(home, "opt", "--ratio", 0.25, "--export", "gguf"))
    assert ran.code == 3
    assert "GGUF" in ran.faults[0]
    assert not list(place.iterdir())
