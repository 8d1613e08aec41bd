"""`slim` out of the walk and out of the pipeline: what is written, read number by number, against slow plain code."""

import copy
import itertools
import json
import struct
from collections.abc import Mapping, Sequence
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
from compress.models.tensor_files import own_name
from compress.planning.plan import Plan
from compress.planning.prepare import Job
from compress.stages._slim_parts import Adapt, Prune, Quantize
from compress.stages._stage import StageConfig
from compress.stages.refit import Refit
from compress.stages.slim import Slim
from factorizing import block_linears, reports, same_function
from runs import job_of, unproved

WINDOWS = oracles.random_ids(8, 16, seed=2)
UNSEEN = oracles.random_ids(2, 24, seed=3)
# What transformers and peft have to say of one another, and of a checkpoint that is unpacked while it is loaded.
pytestmark = [
    pytest.mark.usefixtures("exact_norms"),
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("llama", "phi3", "mixtral")},
    "gpt_neox, one after the other": ("gpt_neox", {"use_parallel_residual": False}),
}


# ---- a walk, and what it wrote ----


def walked(folder: Path, stages: Sequence[StageConfig], *, held_out: int = 0) -> oracles.Walked:
    config = load_config(folder)
    layout = Stock(config, families.find(config)).layout(torch.float64)
    return oracles.walked(folder, stages, WINDOWS, held_out=held_out, layout=layout)


def numbers_in(words: Tensor, bits: int, count: int) -> Tensor:
    """Signed codes, a row at a time as one large number: low bits first."""
    rows = [int.from_bytes(row.numpy().tobytes(), "little") for row in words]
    codes = [[(row >> bits * j) % 2**bits - 2 ** (bits - 1) for j in range(count)] for row in rows]
    return torch.tensor(codes, dtype=torch.float64)


Tensors = Mapping[str, Tensor]


def codes_of(tensors: Tensors, path: str, bits: int) -> Tensor:
    if f"{path}.weight" in tensors:
        return tensors[f"{path}.weight"].double()
    _, n = tensors[f"{path}.weight_shape"].tolist()
    return numbers_in(tensors[f"{path}.weight_packed"], bits, n)


def weight_of(tensors: Tensors, path: str, bits: int | None) -> Tensor:
    """S: codes less their zero points, times the scales of their groups."""
    if bits is None:
        return tensors[f"{path}.weight"].double()
    codes, scale = codes_of(tensors, path, bits), tensors[f"{path}.weight_scale"].double()
    m, n = codes.shape
    zero = tensors.get(f"{path}.weight_zero_point")
    if zero is None:
        zero = torch.zeros(1)
    elif zero.dtype == torch.int32:
        zero = numbers_in(zero.T.contiguous(), bits, m).T
    scale, zero = (x.double().expand(m, -1).repeat_interleave(n // x.shape[-1], dim=1) for x in (scale, zero))
    return (codes - zero) * scale


def adapter_of(tensors: Tensors, path: str) -> tuple[Tensor, Tensor]:
    A, B = (tensors[f"base_model.model.{path}.lora_{kind}.weight"].double() for kind in "AB")
    return A, B


def written_model(model: PreTrainedModel, tensors: Tensors, adapter: Tensors, bits: int | None) -> PreTrainedModel:
    """The dense model with S + B A in its linears' places and all else as it was written."""
    tensors = {own_name(name): tensor for name, tensor in tensors.items()}
    made, state, rest = copy.deepcopy(model), {}, dict(tensors)
    for path in block_linears(model):
        W = weight_of(tensors, path, bits)
        if f"base_model.model.{path}.lora_A.weight" in adapter:
            A, B = adapter_of(adapter, path)
            W = W + B @ A
        state[f"{path}.weight"] = W
        for name in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight"):
            rest.pop(f"{path}.{name}", None)
    missing, unexpected = made.load_state_dict({**state, **rest}, strict=False)
    assert unexpected == []
    assert set(missing) <= ({"lm_head.weight"} if made.config.tie_word_embeddings else set())
    return made


def kept_of_groups(S: Tensor, group: int) -> Tensor:
    return (S.unflatten(1, (-1, group)) != 0).sum(-1)


OURS = Slim(
    prune=Prune(method="admm", iterations=5),
    quantize=Quantize(group="channel"),
    adapt=Adapt(rank=0.1, rounds=2),
    polish=1,
    center=True,
)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_written_is_sparse_on_its_grid_and_what_the_walk_computes(variant, models):
    model_type, changes = VARIANTS[variant]
    blocks = {"num_hidden_layers": 2 if model_type == "llama" else 1}
    model, folder = models(model_type, **blocks, **changes)
    result = walked(folder, [Refit(), OURS], held_out=2)
    adapter = {name: tensor for part in result.parts for name, tensor in part.adapter.items()}
    linears = block_linears(model)
    assert len(adapter) == 2 * len(linears)
    assert reports(result).keys() == linears.keys()
    tensors = {own_name(name): tensor for name, tensor in result.tensors.items()}
    for path, linear in linears.items():
        (m, n), codes = linear.weight.shape, codes_of(tensors, path, 4)
        assert float(codes.min()) >= -8
        assert float(codes.max()) <= 7
        assert len(codes.unique()) > 8  # the grid is made use of
        S = weight_of(tensors, path, 4)
        assert int(kept_of_groups(S, 4).max()) == 2
        A, B = adapter_of(adapter, path)
        rank = max(1, int(0.1 * min(m, n)))
        assert (A.shape, B.shape) == ((rank, n), (m, rank))
        assert reports(result)[path]["adapter_rank"] == rank
    made = written_model(model, result.tensors, adapter, 4)
    same_function(oracles.logits_of(made, WINDOWS[:1]), result.probe_logits, 1e-10)
    # It is no small change, so that the agreement means something.
    assert oracles.largest_difference(oracles.logits_of(model, WINDOWS[:1]), result.probe_logits) > 0.05


# ---- SLiM, written out on a whole model ----


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
        quantize=Quantize(method="slim", group="tensor"),
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


# ---- runs of the pipeline ----


Stages = Sequence[StageConfig | dict[str, Any]]


def run_unproved(job: Job) -> tuple[Plan, pipeline.Result]:
    """What was planned, and what came out."""
    plan = pipeline.plan_only(job)
    with unproved():
        return plan, pipeline.run(job)


def json_of(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def stage(form: str = "packed", **parts: Any) -> dict[str, Any]:
    return {"stage": "slim", "form": form, **parts}


WANDA = {"method": "wanda", "pattern": "2:4"}
FOUR = {"method": "mse", "bits": 4, "group": "channel"}
TENTH = {"method": "whitened", "rank": 0.1}
FORMS = ("packed", "compact", "dense")


# ---- sizes on disk ----


def file_bytes(file: Path) -> int:
    """What a safetensors file holds besides its header."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
    return file.stat().st_size - 8 - int(length)


def is_as_planned(plan: Plan, result: pipeline.Result) -> None:
    files = [*result.out.glob("*.safetensors"), *result.out.glob("adapter/*.safetensors")]
    assert plan.size == result.size
    assert sum(file_bytes(file) for file in files) == result.size.bytes
    for alternative in plan.alternatives[:1]:
        assert alternative.bytes == result.size.bytes


# ---- faces ----


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Path:
    """The same recipe in every form; refitted, with ranks that differ."""
    folder = tmp_path_factory.mktemp("faces")
    parts = {"prune": WANDA, "quantize": FOUR | {"group": 16}, "adapt": {"method": "whitened", "rank": 0.25}}
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


# ---- sizes ----


SIZED: dict[str, tuple[str, dict[str, Any]]] = {
    "packed, fp8 and its inputs": ("packed", {"quantize": {"bits": 8, "floating": True}, "inputs": "fp8"}),
    "packed, nvfp4": ("packed", {"quantize": {"bits": 4, "floating": True, "group": 16}, "adapt": TENTH}),
    "compact, ragged groups": ("compact", {"prune": WANDA, "quantize": FOUR | {"group": 24, "bits": 3}}),
    "compact, 4 of 8 of floats": ("compact", {"prune": {"method": "wanda", "pattern": "4:8"}, "adapt": TENTH}),
    "compact, an adapter of codes": ("compact", {"quantize": FOUR, "adapt": TENTH | {"bits": 4, "group": 16}}),
}


@pytest.mark.parametrize("name", SIZED)
def test_what_is_planned_is_what_is_written(name, tmp_path):
    form, parts = SIZED[name]
    job = job_of(tmp_path, "opt", [stage(form, **parts)], dtype="bfloat16")
    plan, result = run_unproved(job)
    is_as_planned(plan, result)
    # QuantType: those that are kept, and the adapter's.
    dense = tiny.tiny_model("opt", num_hidden_layers=1)
    numbers = sum(parameter.numel() for parameter in dense.parameters())
    kept = 0.5 if form == "compact" and "prune" in parts else 1
    with_adapter = "adapt" in parts and form != "dense"
    for linear in block_linears(dense).values():
        m, n = linear.weight.shape
        rank = max(1, int(0.1 * min(m, n))) if with_adapter else 0
        numbers += int(kept * m * n) - m * n + rank * (m + n)
    assert result.size.parameters == numbers


# ---- models that are not as they should be ----


def change_linears(model: PreTrainedModel, how: str) -> None:
    for path, linear in block_linears(model).items():
        first = path.endswith(("fc1", "gate_proj", "up_proj"))
        if how == "a matrix of zeros" and path.endswith(("down_proj", "fc2", "q_proj", "v_proj")):
            linear.weight.zero_()
        if how == "dead neurons" and first:
            linear.weight[:10] = 0
            linear.bias[:10] = 0
        if how == "constant neurons" and first:
            linear.weight[:10] = 0
            linear.bias[:10] = 1
        if how == "an outlier":
            linear.weight[1, 2] = 300


STRANGE = ("a matrix of zeros", "dead neurons", "constant neurons", "an outlier", "16 tokens")
RECIPES: dict[str, Stages] = {
    "ours": [
        {"stage": "refit"},
        stage(prune={"iterations": 5}, quantize={}, adapt={"rounds": 2}, polish=1, center=True),
    ],
    "slim": [stage(prune=WANDA, quantize={"method": "slim", "group": "tensor"}, adapt={"method": "slim"})],
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
