"""`compress finetune` as a user types it: every kind of checkpoint, and what stays as it was."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import compress
from cli_runner import flat, invoke, snapshot, succeeds
from oracles import logits_of, random_ids
from outputs import write_outputs
from tiny import write_model, write_text

pytestmark = pytest.mark.slow
KINDS = ("sliced", "turned", "thin", "packed", "odd")
SHORT = ["--data", "text.txt", "--seq-len", 32, "--batch-size", 4, "--steps", 6, "--set", "eval_every=3"]
DATA = ["--data-dir", "data"]
ALONE = ["--distill", "none", "--lr", 0.003]
IDS = random_ids(2, 16)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    write_outputs(home, *KINDS)
    (home / "data/wikitext-2").mkdir(parents=True)
    write_text(home / "data/wikitext-2/wiki.valid.raw", lines=40, seed=5)
    write_text(home / "text.txt", lines=200)  # more of it than they were calibrated on
    return home


@pytest.fixture
def place(home, unproved, tmp_path, monkeypatch):
    """Commands run in `home`; an empty folder for outputs."""
    monkeypatch.setattr("compress.tuning.tuner.verify", lambda *_arguments, **_options: 0.0)
    monkeypatch.chdir(home)
    return tmp_path


def tuned(kind: str, out: Path, *more: object) -> Any:
    return succeeds("finetune", kind, *SHORT, *DATA, *ALONE, "--out", out, "--json", *more).json


@pytest.fixture(scope="module")
def made(home, tmp_path_factory):
    """Each kind tuned once, by its name: what was said, and the folder."""
    found: dict[str, tuple[Any, Path]] = {}

    def of(kind: str) -> tuple[Any, Path]:
        if kind not in found:
            out = tmp_path_factory.mktemp("made") / "out"
            found[kind] = tuned(kind, out), out
        return found[kind]

    return of


def facts_of(folder: Path) -> Any:
    return json.loads((folder / "compress.json").read_text(encoding="utf-8"))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.rglob("*.safetensors")) for name, tensor in load_file(file).items()}


def changed(before: Path, after: Path) -> set[str]:
    first, second = tensors_of(before), tensors_of(after)
    assert first.keys() == second.keys()
    assert all(first[name].shape == second[name].shape for name in first)
    assert all(first[name].dtype == second[name].dtype for name in first)
    return {name for name in first if not torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8))}


def endings(names: set[str]) -> set[str]:
    return {".".join(name.split(".")[-2:]) for name in names}


# Of each kind: what is trained, and how the names of what has other numbers then end.
TRAINED = {
    "sliced": ("lora", {f"{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down")}),
    "turned": (
        "lora",
        {
            *(f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")),
            *(f"{name}_shortcut.weight" for name in ("attention", "mlp")),
        },
    ),
    "thin": ("factors", {"first.weight", "second.weight", "first.bias", "second.bias"}),
    "packed": ("adapters", {"lora_A.weight", "lora_B.weight"}),
}


@pytest.mark.parametrize("kind", TRAINED)
def test_only_what_is_trained_changes_and_no_file_its_size(home, place, made, kind):
    said, out = made(kind)
    what, names = TRAINED[kind]
    assert said["trained"] == what
    assert said["steps"] == said["best_step"] == 6
    assert said["held_out"]["after"] < said["held_out"]["before"]
    assert said["bytes"] == said["compressed_bytes"]
    assert endings(changed(home / kind, out)) <= names
    assert len(endings(changed(home / kind, out))) >= 2
    sizes = [
        {f.relative_to(root): f.stat().st_size for f in root.rglob("*.safetensors")} for root in (home / kind, out)
    ]
    assert sizes[0] == sizes[1]
    for name in ("config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (home / kind / name).read_bytes()
    before, after = facts_of(home / kind), facts_of(out)
    untouched = {name for name, digest in before["parts"].items() if after["parts"][name] == digest}
    same = {name for name in before["parts"] if (out / name).read_bytes() == (home / kind / name).read_bytes()}
    assert untouched == same
    assert after["recipe"] == before["recipe"]
    assert succeeds("inspect", out, "--json").json["verified"] is True
    assert said["reload_difference"] == 0.0
    if kind == "packed":
        weights = [file.name for file in (home / "packed").glob("*.safetensors")]
        assert all((out / name).samefile(home / "packed" / name) for name in weights)
        linears = succeeds("inspect", out, "--json").json["linears"]
        assert all(linear["pattern_kept"] for linear in linears if linear["pattern"])
    assert (logits_of(compress.load(out), IDS) - logits_of(compress.load(home / kind), IDS)).abs().max() > 1e-3


def test_compact_adapters_in_codes_stay_in_codes(home, place):
    compact = "slim --fast --sparsity none --group 16 --adapter-rank 4 --set slim.adapt.num_bits=4 --compact --no-refit"
    text = ["--calib", "text.txt", "--samples", 8, "--seq-len", 32, "--out", place / "codes"]
    succeeds(*compact.split(), "--model", "llama", *text)
    said = tuned(str(place / "codes"), place / "out", "--lr", 0.05)
    assert said["held_out"]["after"] < said["held_out"]["before"]
    assert endings(changed(place / "codes", place / "out")) == {"first.codes", "second.codes"}


def test_where_nothing_can_be_merged_an_adapter_is_put_beside_and_its_size_told(home, place):
    said = tuned("odd", place / "out")
    added = (place / "out/adapter/adapter_model.safetensors").stat().st_size
    assert said["trained"] == "lora"
    assert said["lora"]["merged"] is False
    assert 0 < said["bytes"] - said["compressed_bytes"] < added
    assert any(f"adds {said['bytes'] - said['compressed_bytes']:,} bytes" in note for note in said["notes"])
    base = {name for name in tensors_of(place / "out") if not name.startswith("base_model.")}
    first, second = tensors_of(home / "odd"), tensors_of(place / "out")
    assert base == first.keys()
    assert all(torch.equal(first[name], second[name]) for name in base)
    assert succeeds("inspect", place / "out", "--json").json["verified"] is True
    again = tuned(str(place / "out"), place / "again")  # what was added can be trained on
    assert again["trained"] == "adapters"
    assert again["held_out"]["before"] == pytest.approx(said["held_out"]["after"], abs=1e-6)
    assert again["bytes"] == again["compressed_bytes"] == said["bytes"]


def test_all_weights_can_be_trained_and_a_lora_on_factors(home, place):
    said = tuned("sliced", place / "all", "--train", "all")
    assert said["trained_parameters"] == sum(tensor.numel() for tensor in tensors_of(home / "sliced").values())
    assert "embed_tokens.weight" in endings(changed(home / "sliced", place / "all"))
    tuned("thin", place / "lora", "--train", "lora")
    assert endings(changed(home / "thin", place / "lora")) >= {"first.weight", "second.weight"}


def test_it_says_of_itself_what_it_was_trained_on(home, place):
    out, other = place / "out", write_text(place / "other.txt", lines=200, seed=8)
    tuned("thin", out, "--data", other, "--distill", "logits")
    tuning = facts_of(out)["tuning"]
    assert tuning["teacher"] == "llama"
    assert tuning["held_out"]["dense"] is not None
    assert tuning["data"]["source"] == str(other)
    assert tuning["compressed_parts"] == facts_of(home / "thin")["parts"]
    assert tuning["other_text"]["source"] == "wikitext2"
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "The low-rank factors were trained to match the next-token distribution of `llama` on " in card
    assert "compress finetune thin --data" in card
    assert "The result was then fine-tuned." in card
    header = yaml.safe_load(card.split("---")[1])
    assert "datasets" not in header
    shown = flat(succeeds("inspect", out, "--card").out)
    assert (out / "README.md").read_text(encoding="utf-8") == card  # written again from what compress.json says
    assert "tuned on" in shown
    held = tuning["held_out"]
    assert f"{math.exp(held['before']):.2f} to {math.exp(held['after']):.2f}" in shown


def test_nothing_better_leaves_the_weights_as_they_were(home, place, monkeypatch):
    losses = iter([2.0, 3.0, 4.0])
    monkeypatch.setattr("compress.tuning.training.Training.held_out_loss", lambda _self: next(losses))
    said = tuned("thin", place / "out")
    assert said["best_step"] == 0
    assert not changed(home / "thin", place / "out")
    assert said["held_out"]["after"] == said["held_out"]["before"]
    assert any("its weights are unchanged" in note for note in said["notes"])


def test_a_dry_run_says_what_would_be_trained(home, place, made):
    before = snapshot(home)
    said = tuned("thin", place / "out", "--dry-run")
    assert said["trained"] == "factors"
    assert said["trained_parameters"] == made("thin")[0]["trained_parameters"]
    assert not (place / "out").exists()
    assert snapshot(home).keys() == before.keys()
    assert "the factors" in flat(succeeds("finetune", "thin", *SHORT, *ALONE, "--dry-run").out)


WRONG: dict[str, tuple[list[object], str]] = {
    "a dense model": (["llama"], "has no compress.json. Only checkpoints that compress has made are tuned."),
    "what it has not": (
        ["sliced", "--train", "factors"],
        "--train factors is not for this checkpoint. It has: lora, all.",
    ),
    "a LoRA that is none": (["thin", "--lora-rank", 4], "lora_rank: of --train lora; what is trained here is: factors"),
    "the same place": (["thin", "--out", "thin"], "would replace the model it is made from"),
    "16 bits on a CPU": (
        ["thin", "--dtype", "bfloat16", "--device", "cpu"],
        "--dtype bfloat16: a CPU multiplies 16-bit floats many times more slowly",
    ),
    "a teacher for nothing": (["thin", "--teacher", "llama"], "--teacher has no effect with --distill none."),
    "a strange teacher": (
        ["thin", "--distill", "logits", "--teacher", "other"],
        "--teacher other has a vocabulary of 300",
    ),
    "too long a warmup": (["thin", "--set", "warmup=1.5"], "--set warmup=1.5: Input should be less than or equal to 1"),
    "no setting": (["thin", "--set", "wramup=0.1"], "--set wramup=0.1: Unknown key 'wramup'. Did you mean 'warmup'?"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_told_in_a_line(home, place, case):
    if not (home / "other").exists():
        write_model(home / "other", "llama", dtype=torch.float32, vocab_size=300, num_hidden_layers=1)
    words, message = WRONG[case]
    ran = invoke("finetune", words[0], *SHORT, *ALONE, "--out", place / "out", *words[1:])
    assert ran.code == 2
    assert any(message in fault for fault in ran.faults), ran.err
    assert not list(place.glob("out*"))


def test_a_dense_model_that_is_not_found_is_asked_for(home, place, monkeypatch):
    monkeypatch.chdir(place)
    ran = invoke("finetune", home / "thin", *SHORT, "--data", home / "text.txt")
    assert ran.code == 2
    assert "Name its folder with --teacher" in ran.faults[0]
