"""A NaN or an Inf on the way is told with the block and the module where it comes up, whatever the command."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cli_runner import invoke, untouched
from compress.models.soundness import first_unsound
from tiny import write_model, write_text

TEXT = ["--calib", "text.txt", "--samples", 4, "--seq-len", 32, "--device", "cpu", "--out", "out"]
EVAL = ["eval", "--device", "cpu", "--seq-len", 32, "--limit", 2]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """`loud`: a llama whose second block multiplies beyond what float32 has."""
    home = tmp_path_factory.mktemp("home")
    write_text(home / "text.txt", lines=60)
    write_model(home / "sound", "llama", dtype=torch.float32)
    shutil.copytree(home / "sound", home / "loud")
    for linear in ("gate_proj", "up_proj"):
        scale(home / "loud", f"model.layers.1.mlp.{linear}.weight", 1e25)
    (home / "humaneval").mkdir()
    fields = {"task_id": "a/0", "prompt": "def f():\n", "entry_point": "f", "canonical_solution": "", "test": ""}
    (home / "humaneval" / "HumanEval.jsonl").write_text(json.dumps(fields) + "\n")
    return home


def scale(folder, name: str, factor: float) -> None:
    file = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name] * factor}, file, metadata={"format": "pt"})


def fault_of(home, monkeypatch, *words: object) -> str:
    monkeypatch.chdir(home)
    monkeypatch.delenv("COMPRESS_DATA_DIR", raising=False)
    with untouched(home):
        ran = invoke(*words)
        shutil.rmtree(home / "out.partial", ignore_errors=True)  # what was finished is kept for --resume
    assert ran.code == 1, ran.err
    (fault,) = ran.faults
    return fault


# The commands that compress: the walk in its ways, and the survey before it.


@pytest.mark.parametrize(
    "command",
    [
        ["slice", "--method", "slicegpt", "--ratio", 0.25],
        ["slice", "--ratio", 0.25],
        ["lord", "--rank-frac", 0.5, "--allocation", "fisher"],
        ["slim", "--method", "slim"],
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_an_overflow_of_the_activations_names_block_and_linear(command, home, monkeypatch):
    """Every weight is finite: nothing is wrong with the files."""
    fault = fault_of(home, monkeypatch, *command, "--model", "loud", *TEXT)
    assert fault == (
        "There is a NaN or Inf in the stream after block 1 mlp, first in what mlp.down_proj is given. "
        "Check the weights before it and the text."
    )


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--ppl", "text.txt", "--kl", "sound"], "The loss on 'text.txt', window 0, is nan: a NaN or Inf comes up"),
        (
            ["--humaneval", "--allow-code-execution", "--data-dir", "."],
            "There is a NaN or Inf in the logits of the next token",
        ),
    ],
    ids=["ppl and kl", "humaneval"],
)
def test_a_measure_names_the_linear(words, what, home, monkeypatch):
    fault = fault_of(home, monkeypatch, *EVAL, "--model", "loud", *words)
    assert fault.startswith(what)
    assert "first in what model.layers.1.mlp.down_proj is given. Check the weights" in fault


def test_the_first_place_is_named_and_nothing_stays_hooked():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    x = torch.ones(1, 2)
    assert first_unsound(model, lambda: model(x)) is None
    for number, said in ((2, "the weights of 2"), (1, "the weights of 1"), (0, "the weights of 0")):
        model[number].weight.data.fill_(float("nan"))
        assert first_unsound(model, lambda: model(x)) == said
    assert not any(module._forward_hooks for module in model.modules())


def test_a_speed_without_numbers_is_none(home, monkeypatch):
    monkeypatch.setattr(
        "compress.evaluation.bench.footprint", lambda *_, **__: {}
    )  # in a process of its own, in seconds
    words = ["--prompt", 4, "--new", 2, "--rounds", 1, "--batch-sizes", 1, "--device", "cpu"]
    fault = fault_of(home, monkeypatch, "bench", "loud", "--against", "sound", *words)
    assert fault.startswith(
        "There is a NaN or Inf in the logits of loud, first in what model.layers.1.mlp.down_proj is"
    )
