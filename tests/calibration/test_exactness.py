"""What SliceGPT promises to be exact, in float64: folding, rotating, and slicing at the full width keep every logit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import oracles
import tiny
from compress import families
from compress.stages._stage import StageConfig

pytestmark = pytest.mark.usefixtures("exact_norms")
# Longer than the sliding windows, so that they cut something off.
IDS = oracles.random_ids(2, 24)
WINDOWS = oracles.random_ids(3, 24, seed=2)
SCALE = "scale"
# Every norm's epsilon is large or the stream is small: a wrong epsilon shows.
RMS = {"rms_norm_eps": 1e-2}
LAYER = {"layer_norm_eps": 1e-2}
STARCODER = {"norm_epsilon": 1e-2}
GPT = {"layer_norm_epsilon": 1e-2}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", {SCALE: 0.01}),
    "opt, untied": ("opt", {"tie_word_embeddings": False, SCALE: 0.01}),
    "opt, no biases, norms without affine": ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "llama, biases": ("llama", RMS),
    "llama, no biases": ("llama", {"attention_bias": False, "mlp_bias": False, **RMS}),
    "llama, one key head": ("llama", {"num_key_value_heads": 1, **RMS}),
    "mistral": ("mistral", RMS),
    "qwen2": ("qwen2", RMS),
    "qwen2, window in some blocks": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, **RMS},
    ),
    "qwen3": ("qwen3", RMS),
    "phi": ("phi", LAYER),
    "phi, norms in the attention": ("phi", {"qk_layernorm": True, **LAYER}),
    "phi3": ("phi3", RMS),
    "starcoder2": ("starcoder2", STARCODER),
    "starcoder2, untied, no biases": ("starcoder2", {"tie_word_embeddings": False, "use_bias": False, **STARCODER}),
    "gemma": ("gemma", RMS),
    "gpt_bigcode": ("gpt_bigcode", GPT),
    "gpt_bigcode, untied, no shared heads, the usual MLP": (
        "gpt_bigcode",
        {"tie_word_embeddings": False, "multi_query": False, "n_inner": None, **GPT},
    ),
    "codegen": ("codegen", GPT),
    "gpt_neox": ("gpt_neox", LAYER),
    "gpt_neox, one after the other": ("gpt_neox", {"use_parallel_residual": False, **LAYER}),
    "mixtral": ("mixtral", RMS),
    "mixtral, window, one expert a token": ("mixtral", {"sliding_window": 16, "num_experts_per_tok": 1, **RMS}),
    "qwen2_moe": ("qwen2_moe", RMS),
    "qwen3_moe": ("qwen3_moe", RMS),
    "falcon": ("falcon", GPT),
    "falcon, a norm each": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, **GPT}),
    "falcon, one after the other, alibi, biases": (
        "falcon",
        {"alibi": True, "bias": True, "parallel_attn": False, "multi_query": False, **GPT},
    ),
    "stablelm": ("stablelm", LAYER),
    "stablelm, parallel, no norms in the attention": (
        "stablelm",
        {"use_parallel_residual": True, "qk_layernorm": False, "use_qkv_bias": False, **LAYER},
    ),
    "granite": ("granite", RMS),
    "granitemoehybrid": ("granitemoehybrid", RMS),
    "granitemoehybrid, Mamba in some blocks": ("granitemoehybrid", {**tiny.HYBRID, **RMS}),
    "llama4_text": ("llama4_text", RMS),
    "deepseek_v3": ("deepseek_v3", RMS),
    "deepseek_v3, a dense block": ("deepseek_v3", {"first_k_dense_replace": 1, "q_lora_rank": None, **RMS}),
    "qwen3_moe, a dense block": ("qwen3_moe", {"mlp_only_layers": [1], "intermediate_size": 40, **RMS}),
    "qwen3_5_text": ("qwen3_5_text", RMS),
    "smollm3": ("smollm3", RMS),
    "ministral": ("ministral", RMS),
    "glm": ("glm", RMS),
    "cohere": ("cohere", LAYER),
    "cohere, untied, norms in the attention": ("cohere", {"tie_word_embeddings": False, "use_qk_norm": True, **LAYER}),
    "cohere2": ("cohere2", LAYER),
    "gptj": ("gptj", GPT),
    "olmo": ("olmo", {SCALE: 0.01}),
    "olmo, biases, no clipping": ("olmo", {"attention_bias": True, "clip_qkv": None, SCALE: 0.01}),
}


# Taken as the module is imported, before they are replaced.
STOCK: dict[tuple[Any, str], Any] = {(kind, name): getattr(kind, name) for kind, name in oracles.EXACT}


def dense_model(variant: str) -> PreTrainedModel:
    model_type, changes = VARIANTS[variant]
    options = {key: value for key, value in changes.items() if key != SCALE}
    return oracles.scaled(tiny.tiny_model(model_type, **options), changes.get(SCALE, 1.0))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A variant's folder and its logits, made once."""
    made: dict[str, tuple[Path, torch.Tensor]] = {}

    def make(variant: str) -> tuple[Path, torch.Tensor]:
        if variant not in made:
            model = dense_model(variant)
            folder = tmp_path_factory.mktemp("dense")
            model.save_pretrained(folder)
            made[variant] = folder, oracles.logits_of(model, IDS)
        return made[variant]

    return make


def test_every_family_that_can_be_rotated_has_a_variant():
    exact = {name for name in families.names() if not families.find(config := tiny.tiny_config(name)).not_exact(config)}
    assert {model_type for model_type, _ in VARIANTS.values()} == exact


@pytest.mark.parametrize("model_type", tiny.EVERY)
def test_exact_norms_are_the_stock_ones(model_type):
    model = tiny.tiny_model(model_type)
    exact = oracles.logits_of(model, IDS)
    with pytest.MonkeyPatch.context() as patch:
        for (kind, name), stock_code in STOCK.items():
            patch.setattr(kind, name, stock_code)
        stock = oracles.logits_of(model, IDS)
    # Float32 has 24 bits of the largest number on the way, which the logits' largest stands for.
    assert oracles.largest_difference(exact, stock) < 1e-5 * max(1.0, float(exact.abs().max()))
    assert exact.std() > 0.1


@pytest.mark.parametrize("variant", ["llama, biases", "opt", "cohere"])
def test_epsilon_counts(variant, dense):
    """A wrong epsilon would show below: with none at all the logits are far off."""
    model = dense_model(variant)
    for module in model.modules():
        for name in {"eps", "variance_epsilon"} & vars(module).keys():
            setattr(module, name, 0.0)
    assert oracles.largest_difference(oracles.logits_of(model, IDS), dense(variant)[1]) > 1e-3


CHAINS: dict[str, list[StageConfig]] = {
    "folded": oracles.fold_only(),
    "rotated at random": oracles.fold_and_rotate(signal="normed", final_orientation="random"),
    "sliced at full width": oracles.slicegpt({"linear_ratios": (0, 0), "slice_head": True}),
}
# Slicing folds and rotates first: for families that differ in their table alone it says all.
WALKS = [
    (variant, chain)
    for variant, (model_type, _) in VARIANTS.items()
    for chain in CHAINS
    if variant in (*tiny.SAMPLE, "llama, biases") or chain == "sliced at full width"
]


@pytest.mark.parametrize(("variant", "chain"), WALKS)
def test_logits_are_kept(variant, chain, dense):
    folder, logits = dense(variant)
    result = oracles.walked(folder, CHAINS[chain], WINDOWS)
    assert set(result.widths) == {tiny.HIDDEN}
    assert oracles.largest_difference(oracles.logits_of(oracles.sliced_model(result), IDS), logits) < 1e-9
