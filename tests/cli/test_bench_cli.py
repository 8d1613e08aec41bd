"""`compress bench` and `scripts/gpu_bench.sh`, as they are called."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cli_runner import flat, invoke, succeeds
from compress.checkpoints.quality import read_quality
from compress.evaluation import bench
from stored import storage_of, write_packed
from tiny import POSITIONS, VOCAB_SIZE, write_model

ROOT = Path(__file__).parents[2]
USAGE = 2
# What the machine of a GPU may lack.
HIDDEN = ("compressed_tensors", "peft", "datasets", "typer", "rich", "pytest", "beartype", "pytest_timeout")

RECIPES = ("slim, compact",)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    write_model(home / "dense", "llama", dtype=torch.float32)
    write_model(home / "other", "llama", dtype=torch.float32, vocab_size=VOCAB_SIZE + 1)
    (home / "compressed").mkdir()
    write_packed(home / "compressed" / "packed", storage_of("packed", 4, rank=2))
    facts = {"base_model": "dense", "fingerprints": {"model": "0"}}
    (home / "compressed" / "packed" / "compress.json").write_text(json.dumps(facts))
    return home


@pytest.fixture
def place(home, monkeypatch):
    """Where dense and compressed lie; clean processes are left out."""
    monkeypatch.chdir(home)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    load = {"median": 1.0, "low": 0.5, "high": 2.0}
    found = {"disk": 10**6, "load": load, "before": 2 * 10**6, "loading": 5 * 10**6, "running": None}
    monkeypatch.setattr(bench, "footprint", lambda *_, **__: found)
    return home


QUICK = ("--rounds", 2, "--batch-sizes", "1,2", "--new", 2)


def test_the_newest_output_beside_what_it_was_made_from(place):
    ran = succeeds("bench", *QUICK, "--json")
    found = ran.json
    assert (found["dense"]["name"], found["compressed"]["name"]) == ("dense", "packed")
    assert found["dtype"] == "float32"
    # As long as there are positions.
    assert [(load["batch"], load["prompt"], load["new"]) for load in found["generation"]] == [(1, 62, 2), (2, 62, 2)]
    assert all(load["decode"]["speedup"]["median"] > 0 for load in found["generation"])
    assert found["notes"][-1] == "packed was not made from dense as it is here."
    assert found["linears"] == []


def test_speeds_are_kept_for_the_report(place):
    found = succeeds("bench", *QUICK, "--save", "--json").json
    kept = read_quality(place / "compressed" / "packed")
    (place / "compressed" / "packed" / "quality.json").unlink()
    assert kept is not None
    assert [(speed.dense, speed.batch, speed.prompt, speed.rounds) for speed in kept.speed] == [
        ("dense", 1, 62, 2),
        ("dense", 2, 62, 2),
    ]
    rates = found["generation"][1]["decode"]["tokens_per_second"]
    assert {side: rate.to_dict() for side, rate in kept.speed[1].decode.items()} == rates
    assert "is none of yours" in invoke("bench", "demo", "--against", "dense", "--save").faults[0]


def test_tables(place):
    out = flat(succeeds("bench", *QUICK, "--prompt", "4,5", "--layerwise", "--tokens", 3).out)
    assert "prefill 2 x 5" in out
    assert "decode 2 x 2" in out
    assert "3.0 MB" in out  # the peak above the libraries
    assert "not known" in out
    assert "down_proj (3)" in out
    assert "packed, 4 bits" in out
    assert "above 1, packed is faster" in out
    assert "Linears without a kernel" in out


def test_an_origin_that_is_not_found_and_no_output_at_all(place, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (fault,) = invoke("bench", place / "compressed" / "packed").faults
    assert "packed was made from 'dense', which is no folder here" in fault
    (fault,) = invoke("bench").faults
    assert fault == "There is no output under ./compressed. Name a checkpoint: compress bench OUT."


REFUSED = {
    "all faults at once": (
        ["nothing-like-it", "--batch-sizes", "1,x", "--tokens", "4", "--dtype", "int9", "--device", "gpu"],
        ["--batch-sizes", "--tokens has no effect", "'int9'", "'nothing-like-it'", "--device gpu"],
    ),
    "no positions": (
        ["--prompt", POSITIONS, "--new", 1],
        [f"A prompt of {POSITIONS} and 1 new tokens are more than the model's {POSITIONS} positions. Use --prompt 32"],
    ),
    "another vocabulary": (["--against", "other"], ["a vocabulary of 259 tokens and other one of 260", "--against M"]),
    "no origin": (["dense"], ["dense does not say what it was made from. Name a model: --against M."]),
    "a batch of none": (["--batch-sizes", "0"], ["--batch-sizes takes whole numbers from 1 on", "'0'", "Try 1,8"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(place, name):
    words, said = REFUSED[name]
    ran = invoke("bench", *words)
    assert ran.code == USAGE
    assert ran.out == ""
    assert len(ran.faults) == (len(said) if name == "all faults at once" else 1)
    assert all(words in "\n".join(ran.faults) for words in said)


@pytest.mark.slow
def test_the_gpu_bench_runs_at_toy_size_without_what_a_machine_may_lack(tmp_path):
    """Every part but the tests, in processes of their own; what is missing is said, and nothing fails."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nfor name in {HIDDEN}:\n    sys.modules[name] = None\n")
    changes = {"PYTHONPATH": str(tmp_path), "PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    command = [str(ROOT / "scripts" / "gpu_bench.sh"), "--toy", "--parts", "compress,generation,linears"]
    command += ["--recipes", "slim, compact"]
    done = subprocess.run(command, env=os.environ | changes, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not installed: compressed_tensors, for the proof" in done.stdout
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert data["failed"] == {}
    assert set(data["compress"]) == set(RECIPES)
    assert set(data["generation"]) == set(data["linears"]) == set(data["compress"])
    kinds = {form["kind"] for entries in data["linears"].values() for each in entries for form in each["compressed"]}
    assert "compact" in kinds
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## Compressing, 2 layers, 8 windows of 64 tokens, without the proof by reloading" in text
    assert all(f"| {name} |" in text for name in RECIPES)
