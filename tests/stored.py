"""Linears and whole tiny models whose weights are stored quantized, sparse, with adapters."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from compress import families
from compress.architectures.own import AUTO_MAP, CLASS
from compress.checkpoints.files import adapter_config, carry_modeling
from compress.models.packing import quantization_config, stored_linear
from compress.models.storage import Storage
from compress.numerics.grids import FLOAT8, Grid
from compress.numerics.sparsity import keep_mask
from compress.numerics.steps import make_grid, shared_divisor
from compress.own_model.configuration_compress import CompressConfig
from compress.own_model.modeling_compress import AdaptedLinear, CompressForCausalLM
from matrices import args_of
from tiny import tiny_config, tiny_model


def storage_of(
    form: Any,
    num_bits: int | None,
    group: int | str = "channel",
    *,
    type: str = "int",
    symmetric: bool = True,
    **how: Any,
) -> Storage:
    """num_bits: None for floats. group: what shares a scale, so many inputs or a strategy."""
    weights = None if num_bits is None else args_of(num_bits, group, type=type, symmetric=symmetric)
    return Storage(form, weights, **how)


@dataclass
class Parts:
    """S on its grid and zero outside the mask, an adapter and a bias, all float64."""

    S: Tensor
    grid: Grid | None
    mask: Tensor | None
    A: Tensor | None
    B: Tensor | None
    bias: Tensor | None

    def of(self, x: Tensor) -> Tensor:
        """What the linear makes of its inputs."""
        y = x @ self.S.T
        if self.A is not None and self.B is not None:
            y = y + x @ self.A.T @ self.B.T
        return y if self.bias is None else y + self.bias

    def stored(self, storage: Storage, dtype: torch.dtype) -> AdaptedLinear:
        return stored_linear(storage, self.S, self.grid, self.mask, self.A, self.B, self.bias, dtype)


def parts_of(W: Tensor, storage: Storage, dtype: torch.dtype, *, bias: Tensor | None = None) -> Parts:
    """W as `storage` can hold it."""
    (m, n), W = W.shape, W.double()
    mask = None if storage.pattern is None else keep_mask(W.abs(), storage.pattern)
    S = W if mask is None else W * mask
    grid = None
    if storage.weights is not None:
        finer = 1.0 + (torch.arange(n) % 5 == 0).double() if storage.important_inputs else None
        stored = storage.weights.scale_dtype or dtype
        divisor = shared_divisor(float(S.abs().max())) if stored == FLOAT8 else 1.0
        grid = make_grid(S, storage.weights, method="absmax", stored=stored, finer=finer, divisor=divisor)
        S = grid.nearest(S) if mask is None else grid.nearest(S) * mask
    A = torch.randn(storage.rank, n, dtype=torch.float64) / n**0.5 if storage.rank else None
    B = torch.randn(m, storage.rank, dtype=torch.float64) / 4 if storage.rank else None
    return Parts(S, grid, mask, A, B, None if bias is None else bias.double())


def random_parts(storage: Storage, m: int, n: int, dtype: torch.dtype, *, bias: bool = True) -> Parts:
    torch.manual_seed(0)
    return parts_of(torch.randn(m, n), storage, dtype, bias=torch.randn(m) if bias else None)


def store_linears(model: nn.Module, storage: Storage, dtype: torch.dtype) -> dict[str, Parts]:
    """The linears of the blocks, in place."""
    torch.manual_seed(0)
    found = {}
    linears = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    for path, linear in linears:
        if path != "lm_head":
            found[path] = parts_of(linear.weight.detach(), storage, dtype, bias=linear.bias)
            model.set_submodule(path, found[path].stored(storage, dtype))
    return found


def write_packed(
    folder: Path,
    storage: Storage,
    *,
    dtype: torch.dtype = torch.float32,
    lora: dict[str, Any] | None = None,
    **shape: Any,
) -> None:
    """A tiny Llama as a folder that compressed-tensors and PEFT read."""
    model = tiny_model("llama", dtype=torch.float32, **shape)
    store_linears(model, storage, dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    save_packed(folder, model, storage, lora)


def save_packed(folder: Path, model: Any, storage: Storage, lora: dict[str, Any] | None = None) -> None:
    """lora: what is to be different in the adapter's config."""
    folder.mkdir()
    tensors = model.state_dict()
    save_file({name: tensor for name, tensor in tensors.items() if ".lora_" not in name}, folder / "model.safetensors")
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    if storage.weights is not None:
        config["quantization_config"] = quantization_config({"": storage}, ["lm_head"])
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if storage.rank:
        (folder / "adapter").mkdir()
        factors = {f"base_model.model.{name}.weight": tensor for name, tensor in tensors.items() if ".lora_" in name}
        save_file(factors, folder / "adapter/adapter_model.safetensors")
        ranks = {name.removesuffix(".lora_A"): storage.rank for name in tensors if name.endswith(".lora_A")}
        config = adapter_config("dense", ranks) | (lora or {})
        (folder / "adapter/adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def label(storage: Storage) -> str:
    """What it says besides the defaults."""
    named = [f.name for f in fields(storage) if getattr(storage, f.name) != f.default]
    return "-".join(f"{name}={getattr(storage, name)}" for name in named).replace("Pattern", "").replace(" ", "-")


def compact_model(dense: Any, entries: dict[str, dict[str, Any]], dtype: torch.dtype) -> CompressForCausalLM:
    """Around a dense config, on the meta device."""
    structure = families.find(dense).structure()
    config = CompressConfig(
        text_config=dense, structure=structure, storage=entries, architectures=[CLASS], auto_map=dict(AUTO_MAP)
    )
    config.dtype = dtype
    with torch.device("meta"):
        return CompressForCausalLM(config).eval()


def write_compact(folder: Path, storage: Storage, *, dtype: torch.dtype = torch.float32) -> CompressForCausalLM:
    """A tiny Llama as a folder of our own architecture; the model in it is handed back."""
    inner: Any = tiny_model("llama", dtype=torch.float32)
    parts = store_linears(inner, storage, dtype)
    model = compact_model(inner.config, dict.fromkeys(parts, storage.entry()), dtype)
    for parameter in inner.parameters():
        parameter.data = parameter.data.to(dtype)
    model.model, model.lm_head = inner.model, inner.lm_head
    save_compact(model, folder)
    return model


def save_compact(model: CompressForCausalLM, folder: Path) -> None:
    model.save_pretrained(folder)
    carry_modeling(folder)


def python(code: str, *words: str) -> Any:
    """The JSON that a clean process prints last."""
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}
    # To glibc: what is freed goes back to the system, so that it does not count as memory used.
    environment["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    command = [sys.executable, "-I", "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# The most memory that loading and a forward pass take at a time, besides what imports do. The peak of the process
# itself: getrusage's starts with its parent's.
PEAK = """
import json, re, sys
from pathlib import Path
import torch
from transformers.models.llama import modeling_llama
{load}
def memory(kind):
    return 1024 * int(re.search(rf"{{kind}}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = memory("VmRSS")
model = load(Path(sys.argv[1]), {options})
with torch.inference_mode():
    model(input_ids=torch.arange(16)[None], use_cache=False)
print(json.dumps(memory("VmHWM") - before))
"""
on_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the memory used")


def peak_of(load: str, folder: Path, options: str) -> int:
    """load: what defines `load`, which is given the folder and the options."""
    return int(python(PEAK.format(load=load, options=options), str(folder)))


def wide_llama() -> tuple[Any, list[str]]:
    """A config whose linears take 220 MB in bfloat16, and their paths."""
    sizes = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 4, "num_key_value_heads": 4}
    config = tiny_config("llama", **sizes, attention_bias=False, mlp_bias=False)
    with torch.device("meta"):
        modules = AutoModelForCausalLM.from_config(config).named_modules()
    return config, [path for path, module in modules if isinstance(module, nn.Linear) and path != "lm_head"]
