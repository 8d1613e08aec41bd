"""What others make of a slimmed model: transformers and PEFT in processes without this package, the card's own code."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from cli_runner import environment, succeeds
from compress import pipeline
from compress.checkpoints import reload
from compress.checkpoints.verify import TOLERANCE_16_BIT
from oracles import logits_of, random_ids
from runs import job_of

pytestmark = pytest.mark.slow
IDS = random_ids(1, 24, seed=3)
WANDA = {"method": "wanda", "pattern": "2:4"}
FOUR = {"method": "mse", "num_bits": 4, "strategy": "channel"}
NVFP4 = {"method": "gptq", "num_bits": 4, "type": "float", "group_size": 16}
EIGHT = {"method": "absmax", "num_bits": 8, "strategy": "channel"}
ADAPTER = {"method": "whitened", "rank": 0.25}
OURS = {"prune": WANDA, "quantize": FOUR, "adapt": ADAPTER, "center": True}
# Of each the family, what the stage is told, the dtype that is written, and a head of its own or not.
Made = tuple[str, dict[str, Any], str, bool]
CHECKPOINTS: dict[str, Made] = {
    "packed, rounded and tied": ("opt", OURS, "bfloat16", True),
    "zero points and an adapter": ("qwen2", OURS | {"quantize": FOUR | {"symmetric": False}}, "float32", True),
    "sparse": ("llama", {"prune": WANDA, "adapt": ADAPTER}, "float32", False),
    "fp8 inputs": ("llama", {"quantize": EIGHT | {"type": "float"}, "input_activations": "fp8"}, "float32", False),
    "nvfp4 and an adapter": ("opt", OURS | {"quantize": NVFP4, "prune": None}, "float16", True),
    "mxfp4": ("opt", {"quantize": NVFP4 | {"group_size": 32}, "target": ["attention", "fc1"]}, "float32", False),
    "compact, rounded and tied": ("opt", OURS | {"form": "compact"}, "float16", True),
    "materialized": ("opt", OURS | {"form": "dense"}, "float16", True),
}
OFFLOADED = ("packed, rounded and tied", "sparse", "compact, rounded and tied")
IN_HALF = OFFLOADED[0]  # held in its own dtype where float32 does not fit


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Every checkpoint, and beside it the probe that its walk computed."""
    root = tmp_path_factory.mktemp("made")
    for number, (model_type, told, dtype, tied) in enumerate(CHECKPOINTS.values()):
        folder = root / str(number)
        folder.mkdir()

        def overhear(_out: Path, ids: Tensor, logits: Tensor, folder: Path = folder, **_options: Any) -> float:
            save_file({"ids": ids.contiguous(), "logits": logits.contiguous()}, folder / "probe.safetensors")
            return 0.0

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "verify", overhear)
            stages = [{"stage": "refit"}, {"stage": "slim", **told}]
            pipeline.run(job_of(folder, model_type, stages, changes={"tie_word_embeddings": tied}, dtype=dtype))
    return root


def place_of(made: Path, name: str) -> Path:
    return made / str(list(CHECKPOINTS).index(name))


def code_blocks(folder: Path) -> list[str]:
    card = (folder / "README.md").read_text(encoding="utf-8")
    return [block.replace("PATH", str(folder)) for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL)]


def without_us(block: str) -> str:
    """As the comment in it says: without the package, pass trust_remote_code=True."""
    if "registers the architecture" not in block:
        return block
    block = re.sub(r"import compress.*\n", "", block)
    return re.sub(r'(AutoModelForCausalLM.from_pretrained\("[^"]*")', r"\1, trust_remote_code=True", block)


# A request is code to run, whose `model` is asked for logits, or arguments of reload.py's main.
RUNNER = """
import importlib.util, json, sys, traceback, warnings
import torch
from safetensors.torch import save_file
request = json.load(open(sys.argv[1]))
spec = importlib.util.spec_from_file_location("reload", request["reload"])
reload = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reload)
ids, logits, found = torch.tensor(request["ids"]), {}, {}
for name, arguments in request["reloaded"].items():
    try:
        found[name] = reload.main(*arguments)
    except Exception:
        found[name] = {"failed": traceback.format_exc()}
for name, code in request["code"].items():
    names = {}
    try:
        exec(code, names)
        with torch.inference_mode():
            logits[name] = names["model"].eval()(input_ids=ids, use_cache=False).logits.float().contiguous()
    except Exception:
        found[name] = {"failed": traceback.format_exc()}
save_file(logits, request["logits"])
ours = sorted(module for module in sys.modules if module.split(".")[0] == "compress")
with open(request["answers"], "w") as file:
    json.dump({"found": found, "ours": ours}, file)
"""


def run_clean(folder: Path, reloaded: dict[str, Any], code: dict[str, str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    logits, answers = folder / "logits.safetensors", folder / "answers.json"
    request = {"reload": reload.__file__, "ids": IDS.tolist(), "reloaded": reloaded, "code": code}
    request |= {"logits": str(logits), "answers": str(answers)}
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_MODULES_CACHE": str(folder / "modules"), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-I", "-c", RUNNER, str(folder / "request.json")]
    done = subprocess.run(command, env=environment(**quiet), capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(answers.read_text(encoding="utf-8")), load_file(logits)


@pytest.fixture(scope="module")
def outside(made, tmp_path_factory) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """In one process without this package: every checkpoint reloaded as its proof does, and its card's code run."""
    scratch, reloaded, code = tmp_path_factory.mktemp("outside"), {}, {}
    for name in CHECKPOINTS:
        out, probe = place_of(made, name) / "out", str(place_of(made, name) / "probe.safetensors")
        reloaded[name] = [str(out), probe, 2**30, str(scratch)]
        if name in OFFLOADED:
            reloaded[f"{name}, from disk"] = [str(out), probe, 10**5, str(scratch)]
        code[name] = without_us(code_blocks(out)[-1])
    wrong = shutil.copytree(place_of(made, "sparse") / "out", scratch / "wrong")
    file = wrong / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    tensors[max(tensors)] *= -1
    save_file(tensors, file)
    reloaded["a wrong adapter"] = [str(wrong), reloaded["sparse"][1], 2**30, str(scratch)]
    for tokens in (1, IDS.shape[1]):
        probe = load_file(reloaded[IN_HALF][1])
        probe["logits"][:, :tokens] += probe["logits"].abs().max()
        save_file(probe, scratch / f"{tokens}.safetensors")
        arguments = [reloaded[IN_HALF][0], str(scratch / f"{tokens}.safetensors"), 10**5, str(scratch)]
        reloaded[f"{tokens} tokens"] = arguments
    found, logits = run_clean(scratch, reloaded, code)
    assert found["ours"] == []
    return found, logits


def tolerance(name: str) -> float:
    return {"float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2}[CHECKPOINTS[name][2]]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_it_reloads_with_the_walks_logits(name, outside):
    """In float32 whatever was written; zero points are unpacked in the dtype that was."""
    found = outside[0]["found"][name]
    assert "failed" not in found, found["failed"]
    assert (found["missing"], found["unexpected"], found["mismatched"]) == ([], [], [])
    assert found["difference"] < 1e-5 * found["largest_logit"]
    assert found["bits"] == 32


@pytest.mark.parametrize("name", OFFLOADED)
def test_a_model_larger_than_the_memory_given_reloads(name, outside):
    found = outside[0]["found"][f"{name}, from disk"]
    assert "failed" not in found, found["failed"]
    assert (found["missing"], found["unexpected"], found["mismatched"]) == ([], [], [])
    assert found["difference"] < tolerance(name) * found["largest_logit"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_code_of_the_card_runs_without_our_package_and_gives_the_same_with_it(name, outside, made):
    logits = outside[1][name]
    assert logits.shape == (1, IDS.shape[1], tiny.VOCAB_SIZE)
    assert torch.isfinite(logits).all()
    blocks = [block for block in code_blocks(place_of(made, name) / "out") if "import compress" in block]
    assert blocks or "adapt" not in CHECKPOINTS[name][1] or name == "materialized"
    if blocks and "inputs" not in name:  # transformers' unpacked weights get inputs that are not rounded
        names: dict[str, Any] = {}
        exec(blocks[0], names)
        ours = logits_of(names["model"].eval(), IDS).float()
        assert float((logits - ours).abs().max()) < tolerance(name) * float(logits.abs().max())


def test_in_16_bits_the_median_token_counts(outside):
    """A token of massive activations moves by far more than rounding; a wrong matrix moves all tokens."""
    one, every = (outside[0]["found"][f"{tokens} tokens"] for tokens in (1, IDS.shape[1]))
    assert one["bits"] == every["bits"] == 16
    assert one["difference"] < TOLERANCE_16_BIT * one["largest_logit"]
    assert every["difference"] > 10 * TOLERANCE_16_BIT * every["largest_logit"]


def test_a_wrong_adapter_is_noticed(outside):
    """What is proved is base and adapter together: here the last factor is another one."""
    found = outside[0]["found"]["a wrong adapter"]
    assert found["difference"] > 1e-3 * found["largest_logit"]


def test_ours_is_nearer_to_the_dense_model_than_the_papers_method(tmp_path, monkeypatch):
    """The shipped model at 2:4, 4 bits and a tenth of the rank, on text that nothing was fitted to."""
    monkeypatch.setattr(pipeline, "verify", lambda *_arguments, **_options: 0.0)
    losses = {}
    for name, options in {"dense": None, "slim": ["--method", "slim"], "ours": ["--fast"]}.items():
        model = "demo" if options is None else tmp_path / name
        if options is not None:
            succeeds("slim", *options, "--samples", 8, "--seq-len", 64, "--out", model, "--device", "cpu")
        words = ["--ppl", "stdlib", "--seq-len", 128, "--limit", 4, "--device", "cpu", "--json"]
        (found,) = succeeds("eval", "--model", model, *words).json["perplexity"]
        losses[name] = found["nll"]
    assert losses["dense"] < losses["ours"]
    assert losses["ours"] - losses["dense"] < 0.5 * (losses["slim"] - losses["dense"])
