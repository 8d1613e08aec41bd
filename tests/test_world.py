"""What others do with a sliced model of stock shape: slice it again, quantise it, fine-tune it, each by its own tools.

The dense model's stream lies in half of its dimensions, so that slicing it to three quarters loses nothing and what is
made of the sliced model can be compared with the dense one.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import oracles
import tiny
from compress import pipeline
from compress.job import Job
from compress.models.hub import find_model
from compress.own_model.modeling_compress import CompressForCausalLM
from compress.recipe import parse_recipe
from recipes import anchored, slicegpt

RANK, NARROW, BLOCKS = tiny.HIDDEN // 2, 3 * tiny.HIDDEN // 4, 2
IDS = oracles.random_ids(4, 24, seed=3)
GROUP = 8  # divides the hidden size, the heads' width and the neurons


def relative(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def compressed(source: Path, out: Path, text: Path, method: str, stages: Any) -> pipeline.Result:
    calibration = {"source": str(text), "samples": 8, "seq_len": 32}
    recipe = parse_recipe({"method": method, "stages": stages, "calibration": calibration})
    job = Job(model=find_model(str(source)), recipe=recipe, out=out, command="compress slice")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "verify", lambda *_arguments, **_options: 0.0)  # the tests load it themselves
        return pipeline.run(job)


@torch.no_grad()
def of_low_rank(model: Any) -> Any:
    """What writes the stream writes in half of its dimensions, none of them along an axis."""
    U = torch.linalg.qr(torch.randn(tiny.HIDDEN, RANK, generator=torch.Generator().manual_seed(9)))[0]
    P = U @ U.T
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ P)
    for block in model.model.layers:
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            linear.weight.copy_(P @ linear.weight)
            linear.bias.copy_(P @ linear.bias)
    return model


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("world")
    dense = of_low_rank(tiny.tiny_model("llama", dtype=torch.float32, num_hidden_layers=BLOCKS))
    dense.save_pretrained(root / "dense")
    tiny.tiny_tokenizer().save_pretrained(root / "dense")
    text = tiny.write_text(root / "text.txt")
    result = compressed(root / "dense", root / "sliced", text, "anchored", anchored({"width": NARROW}))
    assert result.is_stock
    return {
        "root": root,
        "text": text,
        "result": result,
        "sliced": root / "sliced",
        "dense": oracles.logits_of(dense, IDS),
    }


def load(folder: Path, **options: Any) -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    model, info = loaded
    assert not any(info.values())
    return model.eval()


def test_the_sliced_model_is_the_dense_one(world):
    """So that what follows means something: it is a plain Llama, narrower, and says the same."""
    model = load(world["sliced"])
    assert type(model) is LlamaForCausalLM
    assert model.config.hidden_size == NARROW
    assert world["result"].size.parameters < world["result"].dense.parameters
    assert relative(oracles.logits_of(model, IDS), world["dense"]) < 1e-5


# ---- by compress itself ----


def test_sliced_again_it_is_narrower_still(world):
    out = world["root"] / "again"
    result = compressed(world["sliced"], out, world["text"], "anchored", anchored({"width": RANK}))
    model, config = load(out), json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert type(model) is LlamaForCausalLM
    assert (config["hidden_size"], config["head_dim"], config["num_attention_heads"]) == (RANK, 8, 4)
    assert config["rms_norm_eps"] == pytest.approx(1e-4 * tiny.HIDDEN / RANK, rel=1e-9)
    assert result.dense == world["result"].size
    assert result.size.parameters < result.dense.parameters
    assert relative(oracles.logits_of(model, IDS), world["dense"]) < 1e-5


def test_sliced_again_by_the_papers_method(world):
    out = world["root"] / "slicegpt"
    stages = slicegpt({"ratio": 1 - RANK / NARROW}, slice_head=True)
    result = compressed(world["sliced"], out, world["text"], "slicegpt", stages)
    model = load(out)
    assert type(model) is CompressForCausalLM
    assert set(result.widths) == {RANK}
    assert model.config.slicing["norm_width"] == NARROW
    assert relative(oracles.logits_of(model, IDS), world["dense"]) < 1e-5


def test_slicing_below_what_there_is_changes_it(world):
    """The comparisons above would be met by no slicing at all."""
    out = world["root"] / "too narrow"
    compressed(world["sliced"], out, world["text"], "anchored", anchored({"width": RANK // 2}))
    assert relative(oracles.logits_of(load(out), IDS), world["dense"]) > 0.05


# ---- by compressed-tensors ----


def test_quantised_by_compressed_tensors(world, tmp_path):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams, is_module_quantized

    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    model = load(world["sliced"])
    precise = oracles.logits_of(model, IDS)
    apply_quantization_config(
        model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]), show_progress=False
    )
    quantised = [module for module in model.modules() if is_module_quantized(module)]
    assert len(quantised) == 7 * BLOCKS
    for linear in quantised:
        groups = linear.weight.detach().unflatten(1, (-1, GROUP))
        scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), weights)
        linear.weight_scale.data.copy_(scale)
        linear.quantization_status = QuantizationStatus.FROZEN
    fake = oracles.logits_of(model, IDS)
    rounding = relative(fake, precise)
    assert 0.01 < rounding < 0.5  # 4 bits are felt, and are no noise

    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(str(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    packed = {name: tensor for name, tensor in tensors.items() if name.endswith("weight_packed")}
    assert len(packed) == 7 * BLOCKS
    assert {tensor.dtype for tensor in packed.values()} == {torch.int32}
    q = "model.layers.0.self_attn.q_proj.weight_packed"
    assert packed[q].shape == (32, NARROW // 8)  # eight 4-bit numbers in each

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(reloaded) is LlamaForCausalLM
    assert relative(oracles.logits_of(reloaded, IDS), fake) < 1e-5


# ---- by peft ----


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_fine_tuned_by_peft(world, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = load(world["sliced"])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config).train()
    trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * 3 * BLOCKS
    optimizer = torch.optim.SGD(trainable, lr=0.05)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0] - 1e-3

    adapted.eval()
    trained = oracles.logits_of(adapted, IDS)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert type(again) is LlamaForCausalLM
    assert relative(oracles.logits_of(again, IDS), trained) < 1e-5
    changed = {name for name, parameter in again.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {
        f"model.layers.{block}.{name}.weight"
        for block in range(BLOCKS)
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    }
