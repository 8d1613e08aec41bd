"""The commands that compress, run whole once each, and what plans, cards and results then say."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import LLAMA_2_7B
from transformers import AutoModelForCausalLM, GPTBigCodeConfig

import compress
from cli_runner import flat, invoke, snapshot, succeeds
from oracles import logits_of, random_ids
from tiny import write_model, write_text

SHORT = ["--calib", "text.txt", "--samples", 8, "--seq-len", 32]
# One whole run of each command, by the name of its output: model and words.
RUNS: dict[str, tuple[str, str]] = {
    "sliced": ("llama", "slice --ratio 0.25 --mlp-ratio 0.5 --kv-ratio 0.5"),
    "turned": ("opt", "slice --ratio 0.25"),
    "budget": ("llama", "slice --keep-params 0.7 --set budget.trial_samples=8"),
    "thin": ("llama", "lord --rank-frac 0.5"),
    "pattern": ("llama", "lord --target *.down_proj,o_proj --rank 8 --materialize"),
    "compact": ("llama", "slim --fast --compact --adapter-rank 4"),
    "papers": ("llama", "slim --method slim --group channel --adapter-rank 5"),
    "quantized": ("opt", "quantize --bits 3 --group 16 --act-order"),
    "together": ("llama", "run slice-lord-slim"),
}
ARCHITECTURES = {"turned": "CompressForCausalLM", "quantized": "OPTForCausalLM"}
ARCHITECTURES |= dict.fromkeys(("thin", "compact", "together"), "CompressForCausalLM")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    for kind in ("llama", "opt"):
        write_model(home / kind, kind, dtype=torch.float32, num_hidden_layers=2)
    write_text(home / "text.txt", lines=60)
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16}
    small = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 2, **heads}
    for name, sizes in {"7b": {}, "shallow": {"num_hidden_layers": 1}, "small": small}.items():
        (home / name).mkdir()
        (home / name / "config.json").write_text(json.dumps(LLAMA_2_7B | sizes))
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
def place(home, unproved, monkeypatch):
    """Where models and outputs lie."""
    monkeypatch.chdir(home)
    return home


@pytest.fixture
def made(place):
    """What a run of RUNS said, and its facts; each is run once."""

    def run(name: str) -> Any:
        said = place / f"{name}.json"
        if not said.exists():
            model, line = RUNS[name]
            ran = succeeds(*line.split(), "--model", model, *SHORT, "--out", name, "--json")
            said.write_text(ran.out)
        return json.loads(said.read_text())

    return run


def facts(place: Path, name: str) -> Any:
    return json.loads((place / name / "compress.json").read_text(encoding="utf-8"))


def weights(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))}


@pytest.mark.parametrize("name", RUNS)
def test_a_whole_run(place, made, name):
    said = made(name)
    assert said["architecture"] == ARCHITECTURES.get(name, "LlamaForCausalLM")
    assert said["loads_without_our_code"] == (said["architecture"] != "CompressForCausalLM")
    assert (said["held_out_divergence"] is None) == (name == "papers")
    assert said["bytes"] < said["dense_bytes"] or name == "pattern"
    assert torch.isfinite(logits_of(compress.load(place / name), random_ids(1, 16))).all()
    plan = dict(succeeds(*RUNS[name][1].split(), "--model", RUNS[name][0], *SHORT, "--dry-run", "--json").json)
    if plan["size"] is not None:
        assert plan["size"] == {"parameters": said["parameters"], "bytes": said["bytes"]}
        written = sum(file.stat().st_size for file in (place / name).rglob("*.*"))
        assert said["bytes"] < written <= plan["disk_bytes"] + 2**17  # the tokenizer
    assert plan["alternatives"] == said["alternatives"] or name == "together"


def test_units_are_deleted_as_asked(place, made):
    assert made("sliced")["units"] == {"kv_groups": 1, "neurons": 24}
    model = AutoModelForCausalLM.from_pretrained(place / "sliced")
    config = model.config
    assert (config.intermediate_size, config.num_key_value_heads, config.num_attention_heads) == (24, 1, 2)
    assert (config.hidden_size, config.head_dim) == (24, 8)
    assert sum(parameter.numel() for parameter in model.parameters()) == made("sliced")["parameters"]
    card = (place / "sliced" / "README.md").read_text()
    assert "a standard `LlamaForCausalLM` checkpoint" in card
    assert "import compress" not in card


def test_budgets_are_kept_and_their_trials_are_told(place, made):
    said, trials = made("budget"), facts(place, "budget")["trials"]
    assert said["parameters"] <= 0.7 * said["dense_parameters"]
    best = min(trials, key=lambda trial: trial["divergence"])
    assert (best["hidden"], best["neurons"]) == (said["widths"][0], said["units"]["neurons"])
    assert trials


def test_ranks_and_patterns(place, made):
    assert set(made("thin")["ranks"].values()) <= {16, 8}  # half of 32; of two KV heads' 16
    assert "import compress" in (place / "thin" / "README.md").read_text()
    said = made("pattern")
    assert {path.split(".")[-1] for path in said["ranks"]} == {"down_proj", "o_proj"}
    assert said["parameters"] == said["dense_parameters"]
    weight = (
        AutoModelForCausalLM.from_pretrained(place / "pattern").get_submodule("model.layers.1.mlp.down_proj").weight
    )
    assert torch.linalg.matrix_rank(weight.double(), rtol=1e-5) == said["ranks"]["model.layers.1.mlp.down_proj"] == 8


def test_gguf_lies_beside_the_checkpoint(place):
    pytest.importorskip("gguf")
    words = ["slice", "--ratio", 0.25, *SHORT, "--export", "gguf", "--out", "exported"]
    said = succeeds(*words, "--model", "llama", "--json").json
    assert any("bias" in note for note in said["notes"])
    assert (place / "exported" / "exported.gguf").stat().st_size > said["bytes"]
    ran = invoke(*words, "--model", "opt", "--overwrite")
    assert ran.code == 3
    assert "GGUF" in ran.faults[0]


def test_the_command_in_the_card_makes_it_again(place, made):
    name = "quantized"
    made(name)
    model, line = RUNS[name]
    verb, *typed = line.split()
    card = (place / name / "README.md").read_text(encoding="utf-8")
    (command,) = [each for each in card.splitlines() if each.startswith(f"compress {verb} ")]
    assert command == facts(place, name)["command"]
    assert command.startswith(f"compress {verb} --model {model} ")
    assert set(typed) < set(shlex.split(command))
    succeeds(*shlex.split(command)[1:], "--out", f"again/{name}", "--overwrite")
    assert snapshot(place / "again" / name) == snapshot(place / name)
    ran = invoke("slim", "--model", name, *SHORT, "--out", "never")  # without its codes a weight cannot be read
    assert (ran.code, "is quantized already" in ran.faults[0]) == (3, True)


def test_a_checkpoints_own_recipe_gives_the_same_bytes(place, made):
    made("turned")
    ran = succeeds("run", "turned/compress.json", "--model", "opt", "--out", "own/turned", "--overwrite")
    assert "The same bytes as those of the checkpoint" in flat(ran.out)
    assert snapshot(place / "turned") == snapshot(place / "own" / "turned")
    words = ["--model", "opt", "--out", "own/other", "--overwrite", "--seed", 1, "--samples", 6]
    assert "unlike in calibration text, recipe" in flat(succeeds("run", "turned", *words).out)


def plan_of(words: str, model: str = "7b") -> Any:
    return succeeds(*words.split(), "--model", model, "--dry-run", "--json").json


def test_the_plan_of_llama_2_7b_by_slim(place):
    """6,476,005,376 weights in the blocks; ranks of 409 and 409; scales of 128 inputs, two bytes each."""
    plan = plan_of("slim")
    weights = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    adapter = 32 * 409 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    stored = weights // 2 + 2 * weights // 128 + 16 * 7 * 32 + 2 * adapter
    assert plan["size"]["bytes"] == plan["dense"]["bytes"] - 2 * weights + stored
    assert plan["size"]["parameters"] == plan["dense"]["parameters"] + adapter
    first, *others = plan["alternatives"]
    assert first == {"name": "this plan", "bits_per_weight": 8 * stored / weights, "bytes": plan["size"]["bytes"]}
    assert round(first["bits_per_weight"], 2) == 6.65
    assert [each["name"] for each in others] == [
        "6 bits, unpruned",
        "4 bits, unpruned, the same adapter",
        "7 bits, unpruned",
    ]
    compact = plan_of("slim --compact --adapter-rank 0")
    assert compact["alternatives"][0]["bits_per_weight"] == 2.75 + 16 / 128
    assert compact["size"]["parameters"] < 0.55 * plan["dense"]["parameters"]
    dense = plan_of("slim --materialize")
    assert (dense["size"], dense["alternatives"]) == (dense["dense"], [])


def test_the_plan_of_a_budget_needs_no_weights(place):
    plan = plan_of("slice --keep-params 0.75", "small")
    for choice in plan["choices"]:
        assert choice["hidden"] % 128 == choice["neurons"] % 128 == 0
        assert choice["parameters"] <= 0.75 * plan["dense"]["parameters"]
        assert choice["bytes"] == 2 * choice["parameters"]
    assert plan["notes"] == []


def test_the_papers_rank_of_starcoder_comes_from_its_config(place):
    """The size of a released model (LoRD, arXiv 2309.14021): both MLP matrices at one rank, or the paper's share."""
    line = "lord --method lord --target mlp --form factors"
    plan = plan_of(f"{line} --rank 3712 --set factorize.multiple=1", "starcoder")
    assert round(plan["size"]["parameters"] / 1e9, 2) == 12.56
    assert plan["memory_bytes"] < 80e9  # an A100, which the paper used, has as much
    assert set(plan_of(f"{line} --rank-frac {1 - 0.3958}", "starcoder")["ranks"].values()) == {3712}


TABLES = {
    "slice --model llama --ratio 0.25": ["would be too coarse for this model"],
    "slice --model llama --keep-params 0.75": ["LlamaForCausalLM (stock: no code of ours)", "shapes that fit"],
    "lord --model 7b --rank-frac 0.5": ["(ours, its code is carried along)", "mlp.down_proj", "2048 x 32"],
    "lord --model llama --keep-params 0.8": ["found from the dense model, by fisher", "parameters, at most"],
    "lord --model llama --rank-frac 0.55 --form factors": [
        "would be no smaller, so these stay dense: self_attn.q_proj"
    ],
    "slim --model 7b": [
        *("LlamaForCausalLM (stock: no code of ours)", "bits a weight, all counted 6.65"),
        *("At about as many bytes", "6 bits, unpruned", "--compact stores them small"),
    ],
}


@pytest.mark.parametrize("line", TABLES)
def test_a_plan_for_people(place, line):
    table = flat(succeeds(*line.split(), "--dry-run").out)
    assert [said for said in TABLES[line] if said not in table] == []
    assert ("widths" in table) == (line == "slice --model llama --ratio 0.25")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--adapter-rank 600", "its adapters have a rank of 512 at most"),
        ("--method slim", "its packed integers have a scale a channel or a group"),
        ("--inputs int8", "it rounds inputs beside 8-bit weights alone"),
        ("--bits 8 --inputs int8 --group channel", None),
    ],
)
def test_what_vllm_cannot_serve_is_told(place, options, reason):
    said = [note for note in plan_of(f"slim {options}", "shallow")["notes"] if "vLLM" in note]
    expected = f"vLLM cannot serve this: {reason}. transformers and compress.load run it."
    assert said == ([] if reason is None else [expected])


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ("--bits 4", "4-bit integers on CPUs without AVX-512"),
        ("--bits 3", "3-bit integers"),
        ("--bits fp8 --group channel", "fp8 weights beside 16-bit inputs"),
        ("--bits nvfp4", "4-bit floats"),
    ],
)
def test_what_vllm_runs_on_gpus_alone_is_told(place, options, what):
    said = [note for note in plan_of(f"quantize {options}", "shallow")["notes"] if "vLLM" in note]
    assert said == [f"vLLM runs this on GPUs; its build for CPUs has no kernel for {what}."]


def test_a_result_is_pushed_once_it_is_finished(place, monkeypatch):
    pushed: list[tuple[Path, str, bool]] = []

    def push(folder: Path, repository: str) -> str:
        pushed.append((folder, repository, (folder / "compress.json").is_file()))
        return "https://hub/me/small"

    monkeypatch.setattr("compress.checkpoints.push.push", push)
    command = ["slice", "--ratio", "0.25", "--model", "llama", *SHORT]
    ran = succeeds(*command, "--out", "pushed", "--overwrite", "--push-to-hub", "me/small")
    assert pushed == [(Path("pushed"), "me/small", True)]
    assert "pushed to https://hub/me/small" in flat(ran.out)
    refused = invoke(*command, "--out", "never", "--push-to-hub", "a/b/c")
    assert refused.code == 2
    assert "'a/b/c'" in refused.faults[0]
    assert not (place / "never").exists()
