"""`compress lord`, as a user types it: ranks, budgets, methods, forms, what does not go together."""

import json
import shlex

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTBigCodeConfig

from cli_runner import flat, invoke, succeeds
from test_cli import LLAMA_2_7B
from tiny import write_model, write_text

LAYERS = 3


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    for kind in ("llama", "opt", "gpt_bigcode"):
        write_model(home / kind, kind, dtype=torch.float32)
    write_text(home / "text.txt", lines=60)
    (home / "7b").mkdir()
    (home / "7b" / "config.json").write_text(json.dumps(LLAMA_2_7B))
    starcoder = {
        "n_embd": 6144,
        "n_layer": 40,
        "n_head": 48,
        "n_positions": 8192,
        "vocab_size": 49152,
        "n_inner": 24576,
    }
    GPTBigCodeConfig(**starcoder, bos_token_id=0, eos_token_id=0, dtype="bfloat16").save_pretrained(home / "starcoder")
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
    return ["lord", "--model", home / kind, *text, *more]


def facts(place, said):
    return json.loads((place / said["out"] / "compress.json").read_text())


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt_bigcode"])
def test_the_default_refits_and_cuts_every_linear(home, place, kind):
    said = succeeds(*words(home, kind, "--rank-frac", 0.5, "--json")).json
    assert said["out"] == f"compressed/{kind}-lord-anchored-rf0.5"
    assert said["architecture"] == "CompressForCausalLM"
    assert said["loads_without_our_code"] is False
    assert said["parameters"] < said["dense_parameters"]
    assert said["held_out_divergence"] > 0
    assert set(said["ranks"].values()) <= {16, 8}  # half of 32; of two KV heads' 16
    model = AutoModelForCausalLM.from_pretrained(place / said["out"])
    assert sum(parameter.numel() for parameter in model.parameters()) == said["parameters"]
    assert len(model.config.factors) == len(said["ranks"])
    card = (place / said["out"] / "README.md").read_text()
    assert "import compress" in card


def test_the_papers_method_on_mlps_alone(home, place):
    options = ["--method", "lord", "--target", "mlp", "--form", "factors", "--rank", 8, "--json"]
    said = succeeds(*words(home, "gpt_bigcode", *options)).json
    assert set(said["ranks"].values()) == {8}
    assert {path.split(".", 3)[-1] for path in said["ranks"]} == {"mlp.c_fc", "mlp.c_proj"}
    assert said["held_out_divergence"] is None


def test_a_pattern_names_linears(home, place):
    said = succeeds(*words(home, "llama", "--target", "*.down_proj,o_proj", "--rank", 8, "--json")).json
    assert {path.split(".")[-1] for path in said["ranks"]} == {"down_proj", "o_proj"}


@pytest.mark.slow
@pytest.mark.parametrize("allocation", ["auto", "uniform", "energy", "mixed", "fisher"])
def test_a_budget_is_kept_and_its_trials_are_told(home, place, allocation):
    options = ["--keep-params", 0.7, "--trial-samples", 8, "--allocation", allocation, "--json"]
    said = succeeds(*words(home, "llama", *options)).json
    assert 0.68 * said["dense_parameters"] < said["parameters"] <= 0.7 * said["dense_parameters"]
    trials = facts(place, said)["trials"]
    assert [trial["allocation"] for trial in trials] == (["energy", "mixed", "fisher"] if allocation == "auto" else [])


@pytest.mark.slow
def test_a_size_on_disk_is_kept(home, place):
    said = succeeds(*words(home, "opt", "--target-size", "80kB", "--trial-samples", 8, "--json")).json
    written = sum(file.stat().st_size for file in (place / said["out"]).glob("*.safetensors"))
    assert 0.9 * 80_000 < written <= 80_000


def test_materialized_it_is_the_stock_model_at_its_old_size(home, place):
    said = succeeds(*words(home, "llama", "--rank-frac", 0.5, "--materialize", "--json")).json
    assert said["architecture"] == "LlamaForCausalLM"
    assert said["loads_without_our_code"] is True
    assert said["parameters"] == said["dense_parameters"]
    model = AutoModelForCausalLM.from_pretrained(place / said["out"])
    weight = model.get_submodule("model.layers.1.mlp.down_proj").weight
    assert torch.linalg.matrix_rank(weight.double(), rtol=1e-5) == said["ranks"]["model.layers.1.mlp.down_proj"] == 16


def test_the_command_makes_it_again(home, place):
    options = ["--rank-frac", 0.5, "--no-refit", "--bias", "--gradient-weight", 0.5, "--allocation", "fisher"]
    made = succeeds(*words(home, "llama", *options, "--json")).json
    command = shlex.split(facts(place, made)["command"])
    assert command[:2] == ["compress", "lord"]
    command[command.index("--model") + 1] = str(home / "llama")
    command[command.index("--calib") + 1] = str(home / "text.txt")
    again = succeeds(*command[1:], "--out", "again", "--json").json
    assert facts(place, made)["parts"] == facts(place, again)["parts"]


@pytest.mark.parametrize(
    ("rank", "billions"), [(4672, 14.92), (4480, 14.45), (4224, 13.82), (3968, 13.19), (3712, 12.56)]
)
def test_the_papers_ladder_of_starcoder_comes_from_its_config(home, place, rank, billions):
    """The sizes of the released models (LoRD, arXiv 2309.14021): both MLP matrices at one rank."""
    options = ["--method", "lord", "--target", "mlp", "--form", "factors", "--rank", rank, "--rank-multiple", 1]
    plan = succeeds("lord", "--model", home / "starcoder", *options, "--dry-run", "--json").json
    assert round(plan["size"]["parameters"] / 1e9, 2) == billions
    assert plan["memory_bytes"] < 80e9  # an A100, which the paper used, has as much
    assert not list(place.iterdir())


def test_the_papers_rank_reduction_is_a_share_of_the_rank(home, place):
    options = ["--method", "lord", "--target", "mlp", "--form", "factors", "--rank-frac", 1 - 0.3958]
    plan = succeeds("lord", "--model", home / "starcoder", *options, "--dry-run", "--json").json
    assert set(plan["ranks"].values()) == {3712}


def test_a_plan_for_people(home, place):
    table = flat(succeeds("lord", "--model", home / "7b", "--rank-frac", 0.5, "--dry-run").out)
    assert "CompressForCausalLM (ours, its code is carried along)" in table
    assert "mlp.down_proj" in table
    assert "2048 x 32" in table
    assert "widths" not in table
    open_ranks = flat(succeeds("lord", "--model", home / "7b", "--keep-params", 0.8, "--dry-run").out)
    assert "found from the dense model, by fisher" in open_ranks
    assert "parameters, at most" in open_ranks


def test_what_stays_dense_is_told(home, place):
    table = flat(succeeds(*words(home, "llama", "--rank-frac", 0.55, "--form", "factors", "--dry-run")).out)
    assert "would be no smaller, so these stay dense: self_attn.q_proj (3 times)" in table


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "got 0 of them"),
        (["--rank-frac", 0.5, "--rank", 4], "got 2 of them"),
        (["--rank-frac", 1.5], "--rank-frac is a share above 0 and up to 1"),
        (["--keep-params", 0.01], "cannot be kept: the least that low-rank factors can come to is"),
        (["--target-size", "50MB"], "The budget deletes nothing"),
        (["--rank-frac", 0.5, "--target", "experts"], "No linear matches the target 'experts'"),
        (
            ["--rank-frac", 0.5, "--method", "svd", "--no-refit"],
            "--refit is an option of --method anchored, not of svd",
        ),
        (["--rank-frac", 0.5, "--method", "lord", "--gradient-weight", 0.5], "--gradient-weight is an option of"),
        (["--rank-frac", 0.5, "--gradient-weight", 1], "--gradient-weight is from 0 up to below 1, got 1.0"),
        (["--keep-params", 0.8, "--method", "lord", "--allocation", "auto"], "--allocation auto compares by trial"),
        (["--rank-frac", 0.5, "--method", "asvd", "--bias"], "--method asvd adds no bias"),
        (["--rank-frac", 0.5, "--materialize", "--form", "factors"], "--materialize multiplies the factors out"),
        (["--rank-frac", 0.5, "--materialize", "--bias"], "has no room for added biases"),
        (["--keep-params", 0.8, "--materialize"], "a budget cannot be kept"),
        (["--rank-frac", 0.9, "--form", "factors"], "No linear would be smaller in factors of these ranks"),
        (["--rank-frac", 0.5, "--method", "lord", "--measure-error"], "goes by the dense model's inputs"),
    ],
)
def test_what_does_not_go_together(home, place, options, said):
    ran = invoke(*words(home, "llama", *options))
    assert ran.code == 2
    assert any(said in fault for fault in ran.faults), ran.faults
    assert not list(place.iterdir())
