"""A CPU multiplies 16-bit floats up to a hundred times more slowly than float32: nothing does so.

Not the commands on a model that is stored in float16, and not the process that reloads what was written, which is run
here within this one: with memory for the model in float32, and without.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.dynamic_module_utils

from cli_runner import invoke, succeeds
from compress.checkpoints import reload, verify
from compress.tuning import tuner
from half_products import Products
from runs import unproved
from tiny import write_model, write_text

LITTLE, PLENTY = 1000, 2**33
TEXT = ["--calib", "text.txt", "--samples", 8, "--seq-len", 32]
COMMANDS: dict[str, list[object]] = {
    "sliced": ["slice", "--keep-params", 0.8, "--set", "budget.trial_samples=8"],
    "packed": ["slim", "--fast", "--group", 16, "--adapter-rank", 4],
    "compact": ["slim", "--fast", "--group", 16, "--adapter-rank", 4, "--compact"],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("half")
    write_model(root / "model", "llama", dtype=torch.float16, num_hidden_layers=1)
    write_text(root / "text.txt", lines=60)
    with unproved(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        patch.chdir(root)
        succeeds("slice", "--ratio", 0.25, "--model", "model", *TEXT, "--out", "narrow")
    return root


@pytest.fixture
def reloads(root, monkeypatch) -> list[dict[str, Any]]:
    """What each reloading finds."""
    found: list[dict[str, Any]] = []

    def run_here(folder: Path, probe: Path, _memory: int, scratch: Path) -> dict[str, Any]:
        for memory in (LITTLE, PLENTY):
            found.append(json.loads(json.dumps(reload.main(str(folder), str(probe), memory, str(scratch)))))
        return found[-1]

    monkeypatch.chdir(root)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(verify, "run_clean", run_here)
    modules = str(root / "modules")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", modules)
    monkeypatch.syspath_prepend(modules)
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_multiplies_16_bit_floats(name, root, reloads):
    with Products() as products:
        ran = succeeds(*COMMANDS[name], "--model", "model", *TEXT, "--out", name, "--json")
    assert products.count > 30
    assert +products.half == {}
    assert ran.json["seconds"]["verify"] > 0
    assert len(reloads) == 2
    for found in reloads:
        assert found["difference"] < (1e-4 if found["bits"] == 32 else 0.05) * found["largest_logit"]
    config = json.loads((root / name / "config.json").read_text())
    assert config.get("text_config", config)["dtype"] == "float16"
    with Products() as products:
        succeeds("eval", "--model", name, "--ppl", "text.txt", "--seq-len", 32, "--limit", 4, "--kl", "model")
    assert products.count > 10
    assert +products.half == {}


@pytest.mark.parametrize("memory", [LITTLE, PLENTY])
def test_no_tuning_does(memory, root, reloads, monkeypatch):
    out = root / f"tuned-{memory}"
    available = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=2 * memory))
    monkeypatch.setattr(tuner, "psutil", available)
    words = ["finetune", "narrow", "--data", "text.txt", "--seq-len", 32, "--teacher", "model", "--out", out]
    with Products() as products:
        succeeds(*words, "--distill", "logits", "--steps", 2, "--batch-size", 2)
    assert products.count > 10
    assert +products.half == {}


def test_who_asks_for_it_is_told(root, reloads):
    for words in (["eval", "--model", "model", "--ppl", "text.txt"], ["finetune", "narrow", "--distill", "none"]):
        ran = invoke(*words, "--dtype", "bfloat16")
        assert ran.code == 2
        (fault,) = ran.faults
        assert fault.startswith("--dtype bfloat16: a CPU multiplies 16-bit floats many times more slowly than float32.")
