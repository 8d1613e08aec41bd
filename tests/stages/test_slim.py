"""`slim` out of the walk and out of the pipeline: what is written, read number by number, against slow plain code."""

import copy
import itertools
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

import compress
import oracles
import tiny
from compress import families, pipeline
from compress.architectures.stock import Stock
from compress.errors import NumericalError
from compress.models.loading import load_config
from compress.planning.plan import Plan
from compress.planning.prepare import Job
from compress.stages._slim_parts import Adapt, Prune, Quantize
from compress.stages._stage import StageConfig
from compress.stages.slim import Slim
from factorizing import block_linears, same_function
from runs import job_of, unproved

WINDOWS = oracles.random_ids(8, 16, seed=2)
UNSEEN = oracles.random_ids(2, 24, seed=3)
# What transformers and peft have to say of one another, and of a checkpoint that is unpacked while it is loaded.
pytestmark = [
    pytest.mark.usefixtures("exact_norms"),
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


def walked(folder: Path, stages: Sequence[StageConfig], *, held_out: int = 0) -> oracles.Walked:
    config = load_config(folder)
    layout = Stock(config, families.find(config)).layout(torch.float64)
    return oracles.walked(folder, stages, WINDOWS, held_out=held_out, layout=layout)


def rounding_error(W: Tensor, step: float) -> float:
    return float(((W / step).round().clamp(-8, 7) * step - W).square().sum())


def is_least(W: Tensor, step: float) -> bool:
    """Whether no step of 1,000 rounds W to 4 bits with an error that is noticeably smaller."""
    largest = float(W.abs().max()) / 7
    tried = min(rounding_error(W, largest * (0.05 + 0.001 * i)) for i in range(1000))
    return rounding_error(W, step) < 1.001 * tried


def slim_by_hand(W: Tensor, step: float, X: Tensor, rank: int) -> Tensor:
    """Wanda 2:4, 4 bits times the step, then SLiM's adapter. S + B A."""
    norm, size = X.square().mean(0).sqrt(), X.abs().mean(0)
    S = torch.zeros_like(W)
    for i, row in enumerate(W):
        for start in range(0, len(row), 4):
            group = range(start, start + 4)
            for j in sorted(group, key=lambda j: float(row[j].abs() * norm[j]))[2:]:
                S[i, j] = step * min(max(round(float(row[j]) / step), -8), 7)
    x = torch.diag(size + size.min())
    U, sigma, Vh = torch.linalg.svd((W - S) @ x)
    return S + U[:, :rank] @ torch.diag(sigma[:rank]) @ Vh[:rank] @ torch.linalg.inv(x)


def test_slim_is_its_paper_written_out_branch_by_branch(models):
    """Each linear by what the compressed prefix gives it while its branch is as it was; every token counts alike."""
    model, folder = models("llama")
    paper = Slim(
        prune=Prune(method="wanda"),
        quantize=Quantize(method="slim", strategy="tensor"),
        adapt=Adapt(method="slim", rank=0.25),
    )
    result = walked(folder, [paper])
    made = copy.deepcopy(model)
    branches = [[f"self_attn.{name}_proj" for name in "qkvo"], [f"mlp.{name}_proj" for name in ("gate", "up", "down")]]
    for block, names in itertools.product(range(2), branches):
        paths = [f"model.layers.{block}.{name}" for name in names]
        inputs = {path: X for path, (X, _) in oracles.passed_through(made, paths, WINDOWS).items()}
        for path in paths:
            linear = made.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            W, step = linear.weight.data, float(result.tensors[f"{path}.weight_scale"])
            assert is_least(W, step)
            linear.weight.data = slim_by_hand(W, step, inputs[path], int(0.25 * min(W.shape)))
    expected = oracles.logits_of(made, WINDOWS[:1])
    same_function(result.probe_logits, expected, 1e-8)
    assert oracles.largest_difference(oracles.logits_of(model, WINDOWS[:1]), expected) > 0.05


Stages = Sequence[StageConfig | dict[str, Any]]


def run_unproved(job: Job) -> tuple[Plan, pipeline.output.Result]:
    """What was planned, and what came out."""
    plan = pipeline.plan_only(job)
    with unproved():
        return plan, pipeline.run(job)


def json_of(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def stage(form: str = "packed", **parts: Any) -> dict[str, Any]:
    return {"stage": "slim", "form": form, **parts}


WANDA = {"method": "wanda", "pattern": "2:4"}
FOUR = {"method": "mse", "num_bits": 4, "strategy": "channel"}
TENTH = {"method": "whitened", "rank": 0.1}
FORMS = ("packed", "compact", "dense")


def file_bytes(file: Path) -> int:
    """What a safetensors file holds besides its header."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
    return file.stat().st_size - 8 - int(length)


def is_as_planned(plan: Plan, result: pipeline.output.Result) -> None:
    files = [*result.out.glob("*.safetensors"), *result.out.glob("adapter/*.safetensors")]
    assert plan.size == result.size
    assert sum(file_bytes(file) for file in files) == result.size.bytes
    for alternative in plan.alternatives[:1]:
        assert alternative.bytes == result.size.bytes


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Path:
    """The same recipe in every form; refitted, with ranks that differ."""
    folder = tmp_path_factory.mktemp("faces")
    parts = {
        "prune": WANDA,
        "quantize": FOUR | {"strategy": "group", "group_size": 16},
        "adapt": {"method": "whitened", "rank": 0.25},
    }
    for form in FORMS:
        stages = [{"stage": "refit"}, stage(form, **parts, center=True)]
        job = job_of(folder, "llama", stages, changes={"dtype": torch.float64}, out=f"as-{form}")
        with unproved():
            pipeline.run(job)
    return folder


def test_the_adapter_is_a_plain_lora_of_scale_one(faces):
    config = json_of(faces / "as-packed/adapter/adapter_config.json")
    tensors = load_file(faces / "as-packed/adapter/adapter_model.safetensors")
    ranks = {name: len(tensor) for name, tensor in tensors.items() if "lora_A" in name}
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["use_rslora"]) == ("LORA", 8, 8, False)
    small = {f"model.layers.0.self_attn.{name}_proj": 4 for name in "kv"}  # two of four heads
    assert config["rank_pattern"] == config["alpha_pattern"] == small
    assert {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): rank for name, rank in ranks.items()
    } == {**dict.fromkeys(block_linears(tiny.tiny_model("llama", num_hidden_layers=1)), 8), **small}
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == names
    assert len(tensors) == 14


def loaded(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **options).eval()


@pytest.fixture(scope="module")
def logits(faces) -> dict[str, Tensor]:
    """Of every form, by whatever loads it."""
    unpacked = loaded(faces / "as-packed", quantization_config=CompressedTensorsConfig(dequantize=True))
    models = {
        "packed, transformers and peft": PeftModel.from_pretrained(unpacked, faces / "as-packed/adapter").eval(),
        "packed, compress.load": compress.load(faces / "as-packed", dtype=torch.float64),
        "compact": loaded(faces / "as-compact"),
        "compact, compress.load": compress.load(faces / "as-compact", dtype=torch.float64),
        "dense": loaded(faces / "as-dense"),
    }
    return {name: oracles.logits_of(model, UNSEEN) for name, model in models.items()}


@pytest.mark.parametrize("name", ["packed, compress.load", "compact", "compact, compress.load", "dense"])
def test_every_form_is_one_function(logits, name):
    same_function(logits[name], logits["packed, transformers and peft"], 1e-9)


SIZED: dict[str, tuple[str, dict[str, Any]]] = {
    "packed, fp8 and its inputs": (
        "packed",
        {"quantize": {"num_bits": 8, "type": "float"}, "input_activations": "fp8"},
    ),
    "packed, nvfp4": ("packed", {"quantize": {"num_bits": 4, "type": "float", "group_size": 16}, "adapt": TENTH}),
    "compact, ragged groups": (
        "compact",
        {"prune": WANDA, "quantize": FOUR | {"strategy": "group", "group_size": 24, "num_bits": 3}},
    ),
    "compact, 4 of 8 of floats": ("compact", {"prune": {"method": "wanda", "pattern": "4:8"}, "adapt": TENTH}),
    "compact, an adapter of codes": ("compact", {"quantize": FOUR, "adapt": TENTH | {"num_bits": 4, "group_size": 16}}),
}


@pytest.mark.parametrize("name", SIZED)
def test_what_is_planned_is_what_is_written(name, tmp_path):
    form, parts = SIZED[name]
    job = job_of(tmp_path, "opt", [stage(form, **parts)], dtype="bfloat16")
    plan, result = run_unproved(job)
    is_as_planned(plan, result)
    # Numbers: those that are kept, and the adapter's.
    dense = tiny.tiny_model("opt", num_hidden_layers=1)
    numbers = sum(parameter.numel() for parameter in dense.parameters())
    kept = 0.5 if form == "compact" and "prune" in parts else 1
    with_adapter = "adapt" in parts and form != "dense"
    for linear in block_linears(dense).values():
        m, n = linear.weight.shape
        rank = max(1, int(0.1 * min(m, n))) if with_adapter else 0
        numbers += int(kept * m * n) - m * n + rank * (m + n)
    assert result.size.parameters == numbers


def change_linears(model: PreTrainedModel, how: str) -> None:
    for path, linear in block_linears(model).items():
        first = path.endswith(("fc1", "gate_proj", "up_proj"))
        if how == "a matrix of zeros" and path.endswith(("down_proj", "fc2", "q_proj", "v_proj")):
            linear.weight.zero_()
        if how == "dead neurons" and first:
            linear.weight[:10] = linear.bias[:10] = 0
        if how == "constant neurons" and first:
            linear.weight[:10] = 0
            linear.bias[:10] = 1
        if how == "an outlier":
            linear.weight[1, 2] = 300


STRANGE = ("a matrix of zeros", "constant neurons", "an outlier", "16 tokens")
RECIPES: dict[str, Stages] = {
    "ours": [
        {"stage": "refit"},
        stage(prune={"iterations": 5}, quantize={}, adapt={"rounds": 2}, polish=1, center=True),
    ],
    "slim": [stage(prune=WANDA, quantize={"method": "slim", "strategy": "tensor"}, adapt={"method": "slim"})],
    "compact": [
        stage("compact", prune={"method": "sparsegpt"}, quantize=FOUR | {"important_inputs": True}, adapt=TENTH)
    ],
}


@pytest.mark.parametrize(
    ("recipe", "model_type", "how"),
    [
        *(("ours", "opt", how) for how in STRANGE),
        ("slim", "llama", "a matrix of zeros"),
        ("compact", "opt", "dead neurons"),
    ],
)
def test_strange_models_and_little_text_work(how, model_type, recipe, tmp_path, monkeypatch):
    made = tiny.tiny_model

    def strange(*arguments: Any, **options: Any) -> PreTrainedModel:
        model = made(*arguments, **options)
        with torch.no_grad():
            change_linears(model, how)
        return model

    monkeypatch.setattr(tiny, "tiny_model", strange)
    job = job_of(tmp_path, model_type, RECIPES[recipe], dtype="float16")
    if how == "16 tokens":  # for linears of 32 and 48 inputs
        calibration = job.recipe.calibration.model_copy(update={"samples": 2, "seq_len": 8})
        job = Job(**{**vars(job), "recipe": job.recipe.model_copy(update={"calibration": calibration})})
    _, result = run_unproved(job)
    assert result.lost < 0.6
    found = oracles.logits_of(compress.load(job.out, dtype=torch.float32), UNSEEN)
    dense = oracles.logits_of(loaded(tmp_path / "dense").float(), UNSEEN)
    assert torch.isfinite(found).all()
    assert oracles.largest_difference(found, dense) < 2 * float(dense.abs().max())


def test_a_scale_that_the_dtype_has_no_room_for(tmp_path, monkeypatch):
    made = tiny.tiny_model

    def strange(*arguments: Any, **options: Any) -> PreTrainedModel:
        model = made(*arguments, **options)
        with torch.no_grad():
            block_linears(model)["model.layers.0.mlp.up_proj"].weight[0, 0] = 1e6
        return model

    monkeypatch.setattr(tiny, "tiny_model", strange)
    job = job_of(tmp_path, "llama", [stage(quantize=FOUR, adapt=TENTH)], dtype="float16")
    with pytest.raises(NumericalError, match=r"block 0 mlp.up_proj.*float16.*--dtype bfloat16"):
        pipeline.run(job)
