"""4-bit floats, NVFP4 and MXFP4: as compressed-tensors has them, bit for bit, and their scales at their best."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compress.models.packing import not_for_vllm, quantization_config, stored_linear
from compress.models.storage import Float4Linear, Storage
from compress.numerics.decomposition import Decomposition, Rounding, decompose_together
from compress.numerics.grids import FLOAT4_STEPS, FLOAT8
from compress.numerics.moments import InputMoments
from compress.numerics.steps import make_grid, rounded, shared_divisor
from matrices import args_of, random
from stored import random_parts

FLOAT4 = {group: args_of(4, group, type="float") for group in FLOAT4_STEPS}
PRESETS = {16: "NVFP4A16", 32: "MXFP4A16"}
FORMATS = {16: "nvfp4-pack-quantized", 32: "mxfp4-pack-quantized"}
EVERY_GROUP = pytest.mark.parametrize("group", PRESETS)


def float4(group: int) -> Storage:
    return Storage("packed", FLOAT4[group])


def theirs(group: int, linear: Float4Linear) -> Tensor:
    """The weight that compressed-tensors unpacks, in bfloat16."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = preset_name_to_scheme(PRESETS[group], ["Linear"])
    tensors = {name: tensor for name, tensor in linear.state_dict().items() if name != "bias"}
    return BaseCompressor.get_value_from_registry(FORMATS[group]).decompress(tensors, scheme)["weight"]


def test_numbers_are_rounded_as_compressed_tensors_does():
    fp4 = pytest.importorskip("compressed_tensors.quantization.utils.fp4_utils")
    x = torch.cat([torch.linspace(-7, 7, 2241), random(1000, 1).flatten().float()])  # with every tie
    assert torch.equal(FLOAT4[16].nearest(x), fp4.cast_to_fp4(x.clone().clamp(-6, 6)))
    assert (FLOAT4[16].lowest, FLOAT4[16].highest) == (-6, 6)


@EVERY_GROUP
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compressed_tensors_unpacks_our_own_weight(group, dtype):
    pytest.importorskip("compressed_tensors")
    parts = random_parts(float4(group), 37, 96, dtype)
    linear = parts.stored(float4(group), dtype)
    assert isinstance(linear, Float4Linear)
    # Nothing is lost: the values need 6 bits of bfloat16's 8.
    assert torch.equal(theirs(group, linear).double(), parts.S)
    assert torch.equal(linear.rows(0, 37, torch.bfloat16).double(), parts.S)
    assert torch.equal(linear.to(torch.float64).rows(3, 30, torch.float64), parts.S[3:30])


@EVERY_GROUP
def test_the_tensors_are_those_that_compressed_tensors_writes(group):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import preset_name_to_scheme

    parts = random_parts(float4(group), 37, 96, torch.float32)
    assert parts.grid is not None
    linear = parts.stored(float4(group), torch.float32)
    found = {name: tensor for name, tensor in linear.state_dict().items() if name != "bias"}
    given = {"weight": parts.S.float(), "weight_scale": (parts.grid.step * parts.grid.divisor).float()}
    if group == 16:
        given["weight_global_scale"] = torch.tensor([parts.grid.divisor])
    written = BaseCompressor.get_value_from_registry(FORMATS[group]).compress(
        given, preset_name_to_scheme(PRESETS[group], ["Linear"])
    )
    assert found.keys() == written.keys()
    for name, tensor in written.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        if name != "weight_packed":
            assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))
    # 0 has two codes, of which theirs may be the one with a sign.
    zero = torch.stack([found["weight_packed"] & 15, found["weight_packed"] >> 4], 2).flatten(1) == 0
    codes = torch.stack([written["weight_packed"] & 15, written["weight_packed"] >> 4], 2).flatten(1)
    assert torch.equal(torch.where(zero, 0, codes), torch.where(codes % 8 == 0, 0, codes))


@EVERY_GROUP
def test_the_config_is_that_of_the_preset(group):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    written = quantization_config({"": float4(group)}, ["lm_head"])
    config = quantization.QuantizationConfig.model_validate(written)
    preset = quantization.preset_name_to_scheme(PRESETS[group], ["Linear"])
    assert config.format == FORMATS[group]
    assert config.config_groups["group_0"].weights == preset.weights
    assert config.config_groups["group_0"].input_activations is None
    assert not_for_vllm(float4(group), 8) is None


@EVERY_GROUP
def test_scales_are_the_best_that_can_be_stored(group):
    """Each is compared with every number of its dtype."""
    W = random(6, 96, seed=3) * 0.02
    stored, divisor = FLOAT4_STEPS[group], shared_divisor(float(W.abs().max())) if group == 16 else 1.0
    grid = make_grid(W, FLOAT4[group], method="mse", stored=stored, divisor=divisor)
    every = torch.arange(1, 127 if group == 16 else 255, dtype=torch.uint8).view(stored).double() / divisor
    pieces = W.unflatten(1, (-1, group))[..., None]
    best = (FLOAT4[group].nearest(pieces / every) * every - pieces).square().sum(2).amin(2)
    error = (grid.nearest(W) - W).square().unflatten(1, (-1, group)).sum(2)
    assert torch.equal(grid.step, rounded(grid.step, stored, divisor))
    assert error.sum() <= 1.01 * best.sum()


def test_weights_that_are_nothing_have_a_divisor_too():
    assert shared_divisor(0.0) == shared_divisor(float("inf")) == shared_divisor(float("nan")) == 1
    grid = make_grid(torch.zeros(4, 32), FLOAT4[16], method="mse", stored=FLOAT8)
    linear = stored_linear(float4(16), torch.zeros(4, 32), grid, None, None, None, None, torch.float32)
    assert not linear.rows(0, 4, torch.float32).any()


@EVERY_GROUP
def test_a_sweep_is_better_than_rounding_and_fused_weights_have_one_divisor(group):
    weights = [random(24, 96, seed=1) * 0.01, random(8, 96, seed=2)]
    X = random(400, 96, seed=4) @ random(96, 96, seed=5)
    moments = InputMoments(mean=torch.zeros(96).double(), second=X.T @ X / len(X), mean_abs=X.abs().mean(0))
    rounding = Rounding(args=FLOAT4[group], steps="mse", sweeps=True, stored=FLOAT4_STEPS[group])

    def errors(how: Decomposition) -> list[float]:
        found = decompose_together(weights, moments, [how] * 2, names=["a", "b"])
        grids = [each.grid for each in found]
        assert len({grid.divisor for grid in grids if grid is not None}) == 1
        for each, grid in zip(found, grids, strict=True):
            assert grid is not None
            assert torch.equal(grid.step, rounded(grid.step, FLOAT4_STEPS[group], grid.divisor))
            m = len(each.S)
            linear = stored_linear(float4(group), each.S, grid, None, None, None, None, torch.bfloat16)
            assert torch.equal(linear.rows(0, m, torch.float64), each.S)
        lacks = [W - each.S for W, each in zip(weights, found, strict=True)]
        return [float((lack @ moments.second * lack).sum()) for lack in lacks]

    nearest = errors(Decomposition(quantize=replace(rounding, sweeps=False)))
    swept, polished = errors(Decomposition(quantize=rounding)), errors(Decomposition(quantize=rounding, polish=2))
    assert all(better < 0.7 * worse for better, worse in zip(swept, nearest, strict=True))
    assert all(better < worse for better, worse in zip(polished, swept, strict=True))
