"""The compact architecture: what its linears compute, and that models of it load and run like any other."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import compress  # noqa: F401 (registers the architecture)
from compress.models.storage import Storage
from compress.numerics.sparsity import Pattern
from compress.numerics.steps import make_grid
from compress.own_model import modeling_compress
from compress.own_model.modeling_compress import CompressForCausalLM
from matrices import args_of
from oracles import random_ids
from stored import Parts, label, random_parts, storage_of, write_compact

M, N = 24, 64
STORAGES = [
    storage_of("compact", 4, group=16, pattern=Pattern(2.0, 4), rank=5, adapter=args_of(4, 16)),
    storage_of("compact", 3, group=40, pattern=Pattern(4.0, 8), rank=5),
    storage_of("compact", 5, group="tensor", important_inputs=True),
    storage_of("compact", 8, type="float", pattern=Pattern(2.0, 4)),
    storage_of("compact", None, pattern=Pattern(2.0, 4), rank=5, adapter=args_of(4, 128)),
]


@pytest.fixture(params=[7, 100], ids=lambda rows: f"blocks of {rows} rows")
def block(request, monkeypatch) -> None:
    monkeypatch.setitem(modeling_compress.BLOCK, "cpu", request.param * N)


def dense(parts: Parts, storage: Storage, dtype: torch.dtype) -> Tensor:
    """S + B A, the factors as their grids round them."""
    if parts.A is None or parts.B is None:
        return parts.S
    factors = [parts.A, parts.B.T]
    if storage.adapter is not None:
        grids = [make_grid(factor, storage.adapter, method="mse", stored=dtype) for factor in factors]
        factors = [grid.nearest(factor) for grid, factor in zip(grids, factors, strict=True)]
    return parts.S + factors[1].T @ factors[0]


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("storage", STORAGES, ids=label)
def test_a_linear_computes_what_the_dense_one_does_and_so_do_its_gradients(storage):
    parts = random_parts(storage, M, N, torch.float64)
    linear, W = parts.stored(storage, torch.float64), dense(parts, storage, torch.float64)
    x = torch.randn(2, 3, N, dtype=torch.float64, requires_grad=True)
    y, weights = linear(x), torch.randn(2, 3, M, dtype=torch.float64)
    assert torch.allclose(y, x @ W.T + parts.bias, atol=1e-12, rtol=1e-12)
    (y * weights).sum().backward()
    assert torch.allclose(x.grad, weights @ W)


@pytest.mark.gpu
@pytest.mark.parametrize("storage", STORAGES, ids=label)
def test_a_gpu_reads_the_same_weight(storage):
    linear = random_parts(storage, M, N, torch.bfloat16).stored(storage, torch.bfloat16)
    weight = linear.rows(0, M, torch.float64)
    assert torch.equal(linear.cuda().rows(0, M, torch.float64).cpu(), weight)


@pytest.mark.parametrize(
    ("storage", "dtype"), [(STORAGES[0], torch.float32), (STORAGES[1], torch.bfloat16)], ids=["float32", "bfloat16"]
)
def test_a_model_comes_back_from_its_folder(storage, dtype, tmp_path):
    model = write_compact(tmp_path, storage, dtype=dtype)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    again, info = loaded
    assert type(again) is CompressForCausalLM
    assert not any(info.values())
    ids = random_ids(2, 12)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    written, kept = load_file(tmp_path / "model.safetensors"), again.state_dict()
    assert all(torch.equal(kept[name], tensor) and kept[name].dtype == tensor.dtype for name, tensor in written.items())
