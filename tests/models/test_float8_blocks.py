"""fp8 weights with a scale for each block of 128 x 128: the blocks, what compressed-tensors makes of them, a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress import pipeline
from compress.errors import UsageError
from compress.models.packing import lacks_cpu_kernel, stored_linear
from compress.models.storage import RoundedInputs, Storage
from compress.models.stored_loading import load_stored
from compress.numerics.grids import FLOAT8
from compress.numerics.steps import StepMethod, make_grid
from matrices import args_of
from oracles import random_ids
from runs import job_of, proved_here
from stored import label

M, N = 200, 384  # the last block has 72 rows
FP8 = args_of(8, "block", type="float")
STORAGES = [Storage("packed", FP8, input_activations="fp8"), Storage("packed", FP8)]
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "attention_bias": False}


def test_cpus_that_have_no_kernel_for_them():
    assert {lacks_cpu_kernel(each) for each in STORAGES} == {"fp8 by blocks on CPUs without AMX"}


def matrix() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(M, N, dtype=torch.float64) * torch.rand(M, 1, dtype=torch.float64).exp()


def blocks(W: Tensor) -> list[tuple[slice, slice]]:
    return [
        (slice(i, min(i + 128, len(W))), slice(j, j + 128))
        for i in range(0, len(W), 128)
        for j in range(0, W.shape[1], 128)
    ]


@pytest.mark.parametrize("method", ["absmax", "mse"])
def test_a_block_has_the_step_that_it_has_alone(method: StepMethod):
    W = matrix()
    step = make_grid(W, FP8, method=method).scale(N).expand(M, N)
    for where in blocks(W):
        alone = make_grid(W[where], args_of(8, "tensor", type="float"), method=method).step
        assert torch.allclose(step[where], alone, rtol=1e-12)
        if method == "absmax":
            assert torch.allclose(alone, W[where].abs().max() / 448)


@pytest.mark.parametrize("storage", STORAGES, ids=label)
def test_the_weight_is_what_compressed_tensors_makes_of_it(storage):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    grid = make_grid(matrix(), FP8, method="absmax", stored=torch.float32)
    S = grid.nearest(matrix())
    linear: Any = stored_linear(storage, S, grid, None, None, None, None, torch.float32)
    assert (linear.weight.dtype, tuple(linear.weight_scale.shape)) == (FLOAT8, (2, 3))
    args = quantization.QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[128, 128])
    assert torch.equal(dequantize(linear.weight, linear.weight_scale, None, args), S.float())
    assert torch.equal(linear.rows(0, M, torch.float64), S)
    assert torch.equal(linear.rows(100, 190, torch.float64), S[100:190])


def test_compressed_tensors_rounds_inputs_as_we_do():
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    torch.manual_seed(0)
    x = torch.randn(2, 5, 256)
    x[0, 0, :128] = 0
    args = QuantizationArgs(num_bits=8, type="float", strategy="group", group_size=128, dynamic=True)
    step, zero = compute_dynamic_scales_and_zp(x, args, nn.Module())
    assert torch.equal(RoundedInputs.apply(x, "fp8", 128), fake_quantize(x, step, zero, args))


def stages(**quantize: Any) -> list[dict[str, Any]]:
    told = {"num_bits": 8, "type": "float", "strategy": "block"} | quantize
    return [{"stage": "refit"}, {"stage": "slim", "quantize": told, "polish": 1, "input_activations": "fp8"}]


def test_a_run_is_written_as_the_preset_of_compressed_tensors(tmp_path: Path):
    """Proved by reload, by transformers."""
    presets = pytest.importorskip("compressed_tensors.quantization.quant_scheme")
    from transformers import AutoModelForCausalLM

    with proved_here(tmp_path / "modules"):
        pipeline.run(job_of(tmp_path, "llama", stages(), changes=WIDE, dtype="float32"))
    out = tmp_path / "out"
    written = json.loads((out / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    (group,) = written["config_groups"].values()
    for part, preset in presets.FP8_BLOCK.items():
        found = type(preset)(**group[part])
        keys = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic")
        assert {key: getattr(found, key) for key in keys} == {key: getattr(preset, key) for key in keys}
    ids = random_ids(1, 24)
    ours = load_stored(out, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(ids).logits
        torch.testing.assert_close(ours(input_ids=ids).logits, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "quantize", "said"),
    [
        ({"intermediate_size": 192}, {}, "A block takes inputs in groups of 128, but mlp.down_proj has 192."),
        ({}, {"type": "int"}, "strategy block is of fp8 weights; take 8-bit floats (--bits fp8), or another strategy"),
    ],
)
def test_what_does_not_fit_is_told_before_the_run(changes, quantize, said, tmp_path):
    with pytest.raises((UsageError, ValueError)) as error:
        pipeline.run(job_of(tmp_path, "llama", stages(**quantize), changes=WIDE | changes, dtype="float32"))
    assert said in str(error.value)
