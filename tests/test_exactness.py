"""What SliceGPT promises to be exact, in float64: folding, rotating, and slicing at the full width keep every logit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import oracles
import tiny
from compress import families

# Longer than the sliding windows, so that they cut something off.
IDS = oracles.random_ids(2, 24)
WINDOWS = oracles.random_ids(3, 24, seed=2)
SCALE = "scale"
# Every norm's epsilon is large or the stream is small: a wrong epsilon shows.
RMS = {"rms_norm_eps": 1e-2}
LAYER = {"layer_norm_eps": 1e-2}
STARCODER = {"norm_epsilon": 1e-2}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", {SCALE: 0.01}),
    "opt, untied": ("opt", {"tie_word_embeddings": False, SCALE: 0.01}),
    "opt, no biases": ("opt", {"enable_bias": False}),
    "opt, norms without affine": ("opt", {"layer_norm_elementwise_affine": False}),
    "opt, no biases, norms without affine": ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "llama, biases": ("llama", RMS),
    "llama, no biases": ("llama", {"attention_bias": False, "mlp_bias": False, **RMS}),
    "llama, tied": ("llama", {"tie_word_embeddings": True, **RMS}),
    "llama, no shared heads": ("llama", {"num_key_value_heads": 4, **RMS}),
    "llama, one key head": ("llama", {"num_key_value_heads": 1, **RMS}),
    "llama, head_dim": ("llama", {"head_dim": 20, **RMS}),
    "mistral": ("mistral", RMS),
    "mistral, no window": ("mistral", {"sliding_window": None, **RMS}),
    "qwen2": ("qwen2", RMS),
    "qwen2, untied": ("qwen2", {"tie_word_embeddings": False, **RMS}),
    "qwen2, window in some blocks": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, **RMS},
    ),
    "qwen3": ("qwen3", RMS),
    "qwen3, biases": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True, **RMS}),
    "phi": ("phi", LAYER),
    "phi, shared heads": ("phi", {"num_key_value_heads": 2, **LAYER}),
    "phi, norms in the attention": ("phi", {"qk_layernorm": True, **LAYER}),
    "phi3": ("phi3", RMS),
    "phi3, tied": ("phi3", {"tie_word_embeddings": True, **RMS}),
    "starcoder2": ("starcoder2", STARCODER),
    "starcoder2, untied, no biases": (
        "starcoder2",
        {"tie_word_embeddings": False, "use_bias": False, **STARCODER},
    ),
    "gemma": ("gemma", RMS),
    "gemma, untied": ("gemma", {"tie_word_embeddings": False, **RMS}),
}


# Taken as the module is imported, before they are replaced.
STOCK_FORWARD: dict[type, Any] = {kind: kind.forward for kind in (*oracles.RMS_NORMS, *oracles.RMS_PLUS_ONE_NORMS)}


@pytest.fixture(scope="module", autouse=True)
def _exact():
    with oracles.exact_norms():
        yield


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


def test_every_family_has_a_variant():
    assert {model_type for model_type, _ in VARIANTS.values()} == set(families.names()) == set(tiny.FAMILIES)


@pytest.mark.parametrize("model_type", tiny.FAMILIES)
def test_exact_norms_are_the_stock_ones(model_type):
    model = tiny.tiny_model(model_type)
    exact = oracles.logits_of(model, IDS)
    with pytest.MonkeyPatch.context() as patch:
        for kind, forward in STOCK_FORWARD.items():
            patch.setattr(kind, "forward", forward)
        stock = oracles.logits_of(model, IDS)
    assert oracles.largest_difference(exact, stock) < 1e-5
    assert exact.std() > 0.1


@pytest.mark.parametrize("variant", ["opt", "llama, biases", "mistral", "qwen2", "qwen3", "phi", "phi3", "gemma"])
def test_epsilon_counts(variant, dense):
    """A wrong epsilon would show below: with none at all the logits are far off."""
    model = dense_model(variant)
    for module in model.modules():
        for name in ("eps", "variance_epsilon"):
            if hasattr(module, name):
                setattr(module, name, 0.0)
    assert oracles.largest_difference(oracles.logits_of(model, IDS), dense(variant)[1]) > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "stages",
    [
        pytest.param(oracles.fold_only(), id="folded"),
        pytest.param(oracles.fold_and_rotate(signal="normed", final_orientation="random"), id="rotated at random"),
        pytest.param(oracles.slicegpt({"linear_ratios": (0, 0), "slice_head": True}), id="sliced at full width"),
    ],
)
def test_logits_are_kept(variant, stages, dense):
    folder, logits = dense(variant)
    result = oracles.walked(folder, stages, WINDOWS)
    assert set(result.widths) == {tiny.HIDDEN}
    assert oracles.largest_difference(oracles.logits_of(oracles.sliced_model(result), IDS), logits) < 1e-9


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_stream_is_the_dense_models(variant, dense):
    """What statistics are taken of: after each block, what the stock block gives; its mean is gone for LayerNorm."""
    folder, _ = dense(variant)
    model = dense_model(variant)
    family = families.find(model.config)
    blocks: Any = model.get_submodule(family.blocks)
    outputs: list[torch.Tensor] = []
    for block in blocks:
        block.register_forward_hook(lambda block, inputs, output: outputs.append(output))
    oracles.logits_of(model, WINDOWS)
    assert len(outputs) == tiny.NUM_BLOCKS
    walk = oracles.new_walk(folder, oracles.fold_only(), WINDOWS, batch_size=2)
    for part in walk.parts():
        if part.name.startswith("block"):
            expected = outputs[part.index - 1]
            if family.norm == "layer":
                expected = expected - expected.mean(-1, keepdim=True)
            found = torch.cat([walk.streams.now(batch)[0] for batch in walk.streams.batches])
            assert oracles.largest_difference(found, expected) < 1e-10


@pytest.mark.parametrize("rotation", [("stream", "random"), ("normed", "pca")], ids=" ".join)
@pytest.mark.parametrize("variant", ["opt", "llama, biases", "phi"])
def test_other_rotations_keep_logits_too(variant, rotation, dense):
    folder, logits = dense(variant)
    signal, final_orientation = rotation
    stages = oracles.slicegpt({"linear_ratios": (0, 0)}, signal=signal, final_orientation=final_orientation)
    result = oracles.walked(folder, stages, WINDOWS)
    assert oracles.largest_difference(oracles.logits_of(oracles.sliced_model(result), IDS), logits) < 1e-9


@pytest.mark.parametrize("variant", ["opt", "llama, biases", "phi"])
def test_slicing_at_full_width_is_rotating(variant, dense):
    """To the bit, so that what holds of the one above holds of the other."""
    folder, _ = dense(variant)
    rotated = oracles.walked(folder, oracles.fold_and_rotate(), WINDOWS)
    sliced = oracles.walked(folder, oracles.slicegpt({"linear_ratios": (0, 0), "slice_head": True}), WINDOWS)
    assert rotated.tensors.keys() == sliced.tensors.keys()
    assert all(torch.equal(rotated.tensors[name], sliced.tensors[name]) for name in sliced.tensors)


@pytest.mark.parametrize("variant", ["opt", "llama, biases", "phi"])
def test_the_probe_is_what_the_written_model_says(variant, dense):
    """The walk's own logits for its probe, which verification compares with, are those of its tensors."""
    folder, _ = dense(variant)
    result = oracles.walked(folder, oracles.slicegpt({"ratio": 0.3}), WINDOWS)
    written = oracles.logits_of(oracles.sliced_model(result), WINDOWS[:1])
    assert oracles.largest_difference(written, result.probe_logits) < 1e-10


def test_rotations_differ_from_one_another(dense):
    """The promises above would hold for no rotation at all; there is one, and it is what was asked for."""
    folder, _ = dense("llama, biases")
    stages = {
        "folded": oracles.fold_only(),
        "stream": oracles.fold_and_rotate(signal="stream"),
        "normed": oracles.fold_and_rotate(signal="normed"),
        "random": oracles.fold_and_rotate(final_orientation="random"),
    }
    tables = [oracles.walked(folder, chain, WINDOWS).tensors["model.embed_tokens.weight"] for chain in stages.values()]
    for i, table in enumerate(tables):
        for other in tables[:i]:
            assert oracles.largest_difference(table, other) > 0.1
