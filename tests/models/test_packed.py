"""The packed form: read by compressed-tensors and PEFT as by us, and fast where torch has a kernel for it."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from compress.errors import CheckpointError, NumericalError
from compress.models.int4 import Int4Linear, problem, use_kernels
from compress.models.packing import unpacks_while_loading
from compress.models.storage import FloatLinear, PackedLinear, QuantizedLinear, RoundedInputs, empty_linear
from compress.models.stored_loading import load_stored
from compress.numerics.sparsity import Pattern
from oracles import random_ids
from stored import (
    Parts,
    label,
    on_linux,
    peak_of,
    python,
    random_parts,
    save_packed,
    storage_of,
    wide_llama,
    write_packed,
)

CPU = torch.device("cpu")
M, N = 48, 96
# By name: how the linears are stored, and the inner width, which is the inputs' of a linear in each block.
WRITTEN = {
    label(storage): (storage, inner)
    for storage, inner in [
        *((storage_of("packed", bits, group=group), 42) for bits, group in ((2, "tensor"), (3, "channel"))),
        (storage_of("packed", 4, group=16), 48),
        (storage_of("packed", 4, group=16, symmetric=False), 48),
        (storage_of("packed", 8, type="float", input_activations="fp8"), 42),
        (storage_of("packed", 4, type="float", group=16), 48),
        (storage_of("packed", 4, type="float", group=32), 64),
        (storage_of("packed", 8, group=16, symmetric=False, input_activations="int8"), 48),
        (storage_of("packed", 4, group=16, pattern=Pattern(2.0, 4)), 48),
    ]
}
DTYPES = (torch.float32, torch.bfloat16)  # in turn
# A stranger: transformers with compressed-tensors, and nothing of ours. Packed zero points transformers can only load
# unpacked: compressed-tensors 0.20 does not expect them in the shape that it gives them itself. When it unpacks 4-bit
# floats late, it leaves them in bfloat16, whatever the model is in.
STRANGER = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
root = Path(sys.argv[1])
ids = load_file(root / "ids.safetensors")["ids"]
answers, found = {}, {}
for folder in sorted(root.glob("model-*")):
    unpacked = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if folder.name in sys.argv[2:] else {}
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **unpacked)
    with torch.no_grad():
        answers[f"{folder.name}/logits"] = model(input_ids=ids).logits
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            answers[f"{folder.name}/{name}"] = module.weight.detach().clone()
    found[folder.name] = any(info.values())
save_file(answers, root / "answers.safetensors")
print(json.dumps([found, [name for name in sys.modules if name.split(".")[0] == "compress"]]))
"""


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_stored(folder, dtype=dtype, device=CPU)


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def stored_linears(model: nn.Module) -> dict[str, Any]:
    kinds = (QuantizedLinear, FloatLinear, Int4Linear)
    return {path: module for path, module in model.named_modules() if isinstance(module, kinds)}


def whole(linear: Any, dtype: torch.dtype) -> Tensor:
    """W, dense."""
    if isinstance(linear, Int4Linear):
        return linear.columns(0, linear.in_features)
    return linear.rows(0, linear.out_features, dtype)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return random_ids(2, 12)


@pytest.fixture(scope="module")
def written(tmp_path_factory, ids) -> tuple[Path, dict[str, Tensor]]:
    """Every model, and what the stranger finds in it: logits, and the weights that it unpacks."""
    pytest.importorskip("compressed_tensors")
    root = tmp_path_factory.mktemp("written")
    unpacked = []
    for number, (storage, inner) in enumerate(WRITTEN.values()):
        write_packed(root / f"model-{number}", storage, dtype=DTYPES[number % 2], intermediate_size=inner)
        if unpacks_while_loading(storage, "llama"):
            unpacked.append(f"model-{number}")
    save_file({"ids": ids}, root / "ids.safetensors")
    found, ours = python(STRANGER, str(root), *unpacked)
    assert not any(found.values())
    assert ours == []
    return root, load_file(root / "answers.safetensors")


@pytest.mark.parametrize("name", WRITTEN)
def test_compressed_tensors_reads_what_we_read(name, written, ids, caplog):
    (root, answers), number = written, list(WRITTEN).index(name)
    model = load(root / f"model-{number}", DTYPES[number % 2])
    linears = stored_linears(model)
    assert len(linears) == 7 * 3
    for path, linear in linears.items():
        assert torch.equal(whole(linear, DTYPES[number % 2]), answers[f"model-{number}/{path}"])
    expected = answers[f"model-{number}/logits"]
    if any(isinstance(linear, Int4Linear) for linear in linears.values()):
        assert close(logits(model, ids), expected.double(), within=0.05)
    else:
        assert torch.allclose(logits(model, ids), expected, rtol=0, atol=1e-5)
        assert "21 because" in caplog.text


def test_compressed_tensors_rounds_inputs_as_we_do():
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    for dtype in DTYPES:
        torch.manual_seed(0)
        x = torch.randn(2, 5, 33).to(dtype)
        x[0, 0] = 0
        for kind, numbers in (("int8", "int"), ("fp8", "float")):
            args = QuantizationArgs(num_bits=8, type=numbers, strategy="token", dynamic=True)
            step, zero = compute_dynamic_scales_and_zp(x, args, nn.Module())
            assert torch.equal(RoundedInputs.apply(x, kind, None), fake_quantize(x, step, zero, args))


@pytest.mark.parametrize(
    ("storage", "bias"),
    [
        (storage_of("packed", 8, type="float"), True),
        (storage_of("packed", 4), False),
        (storage_of("packed", None), True),
    ],
)
def test_adapter_bias_and_weight_are_added(storage, bias):
    storage = replace(storage, rank=3)
    parts = random_parts(storage, M, N, torch.float64, bias=bias)
    x = torch.randn(2, 3, N, dtype=torch.float64, requires_grad=True)
    y, expected = parts.stored(storage, torch.float64)(x), parts.of(x)
    assert torch.allclose(y, expected)
    assert torch.allclose(*(torch.autograd.grad(outputs.sum(), x)[0] for outputs in (y, expected)))


def test_inputs_are_rounded_for_the_weight_and_not_for_the_adapter():
    storage = storage_of("packed", 8, rank=3, input_activations="int8")
    parts = random_parts(storage, M, N, torch.float64)
    x = torch.randn(5, N, dtype=torch.float64, requires_grad=True)
    y, unrounded = parts.stored(storage, torch.float64)(x), parts.of(x)
    assert torch.allclose(y, unrounded + (RoundedInputs.apply(x, "int8", None) - x) @ parts.S.T)
    # The gradient is that of inputs as they are.
    assert torch.allclose(*(torch.autograd.grad(outputs.sum(), x)[0] for outputs in (y, unrounded)))


KERNEL_SHAPES = [(64, 256, 128), (48, 96, "channel"), (2064, 64, 32)]
needs_vectors = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="torch has no 4-bit kernel for this CPU"
)


def int4(m: int, n: int, group: Any, device: torch.device = CPU) -> tuple[Int4Linear, Parts]:
    storage = storage_of("packed", 4, group=group, rank=4)
    parts = random_parts(storage, m, n, torch.bfloat16)
    linear = parts.stored(storage, torch.bfloat16).to(device)
    assert isinstance(linear, PackedLinear)
    assert problem(linear) is None
    return Int4Linear(linear), parts


def check_kernel(linear: Int4Linear, parts: Parts) -> None:
    """bfloat16 has a relative precision of 1/256: outputs and gradients are within 1/100 of the exact ones."""
    x, device = torch.randn(7, linear.in_features).bfloat16(), linear.layout.device
    exact_x = x.double().requires_grad_()
    exact = parts.of(exact_x)
    x = x.to(device).requires_grad_()
    y, weights = linear(x), torch.randn(exact.shape).bfloat16()
    assert close(y, exact)
    (gradient,) = torch.autograd.grad(y, x, weights.to(device))
    assert close(gradient, torch.autograd.grad(exact, exact_x, weights.double())[0])


def close(found: Tensor, exact: Tensor, within: float = 0.01) -> bool:
    exact = exact.detach()
    return float((found.detach().cpu().double() - exact).norm() / exact.norm()) < within


@needs_vectors
@pytest.mark.parametrize(("m", "n", "group"), KERNEL_SHAPES)
def test_the_kernel_computes_what_the_dense_linear_does(m, n, group):
    check_kernel(*int4(m, n, group))


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "group"), [(64, 256, 128), (2056, 128, "channel"), (72, 384, 32)])
def test_the_kernel_computes_what_the_dense_linear_does_on_a_gpu(m, n, group):
    check_kernel(*int4(m, n, group, torch.device("cuda")))


@pytest.mark.parametrize(
    ("storage", "dtype", "m", "why"),
    [
        (storage_of("packed", 3, group=32), torch.bfloat16, M, "integers of 4 bits"),
        (storage_of("packed", 4, symmetric=False), torch.bfloat16, M, "zero points"),
        (storage_of("packed", 4), torch.float32, M, "float32, not bfloat16"),
        (storage_of("packed", 4, group=16), torch.bfloat16, M, "groups of 32 to 256"),
        (storage_of("packed", 4), torch.bfloat16, 40, "multiples of 16 x 32"),
    ],
)
def test_a_linear_without_a_kernel_stays_and_one_warning_says_why(storage, dtype, m, why, caplog, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    model = nn.Sequential(*(random_parts(storage, m, N, dtype).stored(storage, dtype) for _ in range(3)))
    kinds = [type(linear) for linear in model]
    use_kernels(model)
    assert [type(linear) for linear in model] == kinds
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("compress", logging.WARNING)
    assert "3 because" in record.message
    assert why in record.message


@needs_vectors
def test_a_loaded_model_keeps_the_kernels_layout_alone(tmp_path, ids, caplog):
    shape = {"hidden_size": 64, "intermediate_size": 96}
    write_packed(tmp_path / "model", storage_of("packed", 4, group=32, rank=4), dtype=torch.bfloat16, **shape)
    model = load(tmp_path / "model", torch.bfloat16)
    assert caplog.records == []
    linears = stored_linears(model)
    assert {type(linear) for linear in linears.values()} == {Int4Linear}
    buffers = {name for linear in linears.values() for name, _ in linear.named_buffers()}
    assert buffers == {"layout", "scales_and_zeros"}
    unpacked = load(tmp_path / "model", torch.float32)
    assert close(logits(model, ids), logits(unpacked, ids).double(), within=0.05)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize(
    ("storage", "changes"),
    [
        (storage_of("packed", 4, group=16, rank=4), {}),
        (
            storage_of("packed", None, rank=4),
            {"lora_alpha": 2, "alpha_pattern": {"q_proj": 3, "layers.0.mlp.up_proj": 5}},
        ),
    ],
    ids=["quantized", "other alphas"],
)
def test_peft_adds_the_same_adapter(storage, changes, tmp_path, ids):
    peft = pytest.importorskip("peft")
    pytest.importorskip("compressed_tensors")
    write_packed(tmp_path / "model", storage, lora=changes)
    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    without = logits(stock, ids)  # compressed-tensors unpacks at the first call; PEFT needs weights
    adapted = logits(peft.PeftModel.from_pretrained(stock, tmp_path / "model/adapter"), ids)
    assert not torch.allclose(adapted, without, atol=0.1)
    assert torch.allclose(logits(load(tmp_path / "model"), ids), adapted, atol=1e-5)


@on_linux
@needs_vectors
@pytest.mark.slow
def test_the_dense_model_is_never_in_memory(tmp_path):
    config, paths = wide_llama()
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for path in paths:
            n, m = model.get_submodule(path).in_features, model.get_submodule(path).out_features
            storage = storage_of("packed", 4, group=128, rank=64)
            model.set_submodule(path, empty_linear(storage, n, m, bias=False, dtype=torch.bfloat16))
    size = 2 * sum(linear.in_features * linear.out_features for linear in stored_linears(model).values())
    assert size > 200e6
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.zero_()
    for linear in stored_linears(model).values():
        linear.weight_shape.copy_(torch.tensor([linear.out_features, linear.in_features]))
    save_packed(tmp_path / "model", model, storage)
    load = "from compress.models.stored_loading import load_stored as load"
    assert peak_of(load, tmp_path / "model", "dtype=torch.bfloat16, device=torch.device('cpu')") < size / 2


Q = "model.layers.0.self_attn.q_proj"
CONFIG, TENSORS = "config.json", "model.safetensors"
LORA_CONFIG, LORA = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"


def changed(name: str, *keys: str, **values: Any) -> Callable[[Path], None]:
    """In a JSON file, below the keys; None takes a key away."""

    def change(folder: Path) -> None:
        found = inside = json.loads((folder / name).read_text(encoding="utf-8"))
        for key in keys:
            inside = inside[key]
        inside |= values
        for key in [key for key, value in values.items() if value is None]:
            del inside[key]
        (folder / name).write_text(json.dumps(found), encoding="utf-8")

    return change


def quantized(*keys: str, **values: Any) -> Callable[[Path], None]:
    return changed(CONFIG, "quantization_config", *keys, **values)


def grouped(*keys: str, **values: Any) -> Callable[[Path], None]:
    return quantized("config_groups", "group_0", *keys, **values)


def tensor(file: str, name: str, make: Callable[[Any], Any]) -> Callable[[Path], None]:
    """A tensor of a file made of what was there; gone, where that is None."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / file)
        made = make(tensors.pop(name, None))
        save_file(tensors | ({} if made is None else {name: made}), folder / file)

    return change


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another method": (quantized(quant_method="gptq"), "quant_method is 'gptq'"),
    "a cache scheme": (quantized(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
    "odd groups": (grouped("weights", group_size=7), "do not divide into the groups"),
    "too many": (tensor(TENSORS, f"{Q}.weight_g_idx", lambda _: torch.zeros(3)), "has no place in its model"),
    "no alpha": (changed(LORA_CONFIG, lora_alpha=None), "alphas"),
    "static inputs": (grouped(input_activations={"num_bits": 8}), "inputs are rounded in another way"),
    "no codes": (tensor(TENSORS, f"{Q}.weight_packed", lambda found: None), "lacks 1 tensors"),
    "a wrong width": (tensor(TENSORS, f"{Q}.weight_shape", lambda _: torch.tensor([32, 33])), r"says \[32, 33\]"),
    "more than a LoRA": (changed(LORA_CONFIG, use_dora=True), "use_dora"),
    "a broken pattern": (changed(LORA_CONFIG, alpha_pattern={"(": 1}), "alphas"),
    "another factor": (
        tensor(LORA, "base_model.model.x.lora_magnitude_vector", lambda _: torch.zeros(2)),
        "no factor of a LoRA",
    ),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "model"
    write_packed(folder, storage_of("packed", 4, group=16, rank=2), num_hidden_layers=1)
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_in_a_folder_is_said_in_a_line(fault, sound, tmp_path):
    damage, words = FAULTS[fault]
    shutil.copytree(sound, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises((CheckpointError, NumericalError), match=words) as caught:
        load(tmp_path / "model")
    assert "\n" not in str(caught.value)
