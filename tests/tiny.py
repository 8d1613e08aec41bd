"""Tiny random models of every family, built from configs: no downloads, milliseconds each."""

from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 256 + 3
HIDDEN = 32
NUM_BLOCKS = 3
POSITIONS = 64

SHARED: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GATED = {"intermediate_size": 48, "num_key_value_heads": 2}
EXPERTS = {
    # Three of four: each is to see more tokens than its linears have inputs.
    **{"num_key_value_heads": 2, "moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 3},
    "norm_topk_prob": True,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN, "tie_word_embeddings": True, "dropout": 0.0},
    "llama": {**GATED, "rms_norm_eps": 1e-4, "attention_bias": True, "mlp_bias": True},
    "mistral": {**GATED, "head_dim": 12, "sliding_window": 16},
    "qwen2": {**GATED, "tie_word_embeddings": True},
    "qwen3": {**GATED, "head_dim": 16},
    "phi": {"intermediate_size": 48, "partial_rotary_factor": 0.5},
    "phi3": {**GATED},
    "starcoder2": {**GATED, "use_bias": True, "tie_word_embeddings": True},
    "gemma": {**GATED, "head_dim": 12, "tie_word_embeddings": True},
    "gpt_bigcode": {"n_inner": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "codegen": {"n_inner": 48, "rotary_dim": 4},
    "gpt_neox": {"intermediate_size": 48},
    "mixtral": {**GATED, "num_local_experts": 4, "num_experts_per_tok": 3, "head_dim": 12},
}
# Families that differ from those above in what their table says and in nothing else: they run the contract alone.
OTHERS: dict[str, dict[str, Any]] = {
    "falcon": {"ffn_hidden_size": 48, "multi_query": True},
    "stablelm": {**GATED, "use_qkv_bias": True, "qk_layernorm": True},
    "granite": {
        **GATED,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.4,
        "logits_scaling": 4.0,
        "rms_norm_eps": 1e-4,
    },
    "smollm3": {**GATED, "no_rope_layer_interval": 2, "tie_word_embeddings": True},
    "ministral": {**GATED, "head_dim": 12, "sliding_window": 16},
    "glm": {**GATED, "head_dim": 12},
    "cohere": {**GATED, "logit_scale": 0.25, "layer_norm_eps": 1e-4, "tie_word_embeddings": True},
    "cohere2": {**GATED, "logit_scale": 0.25, "sliding_window": 16, "tie_word_embeddings": True},
    "gptj": {"n_inner": 48, "rotary_dim": 4},
    "olmo": {**GATED, "clip_qkv": 1.0},
    "olmo2": {**GATED, "head_dim": 12},
    "olmo3": {**GATED, "head_dim": 12, "sliding_window": 16},
    "glm4": {**GATED, "head_dim": 12},
    "gemma2": {
        **GATED,
        "head_dim": 12,
        "query_pre_attn_scalar": 12,
        "sliding_window": 16,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {**GATED, "head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 16},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 1},
    "qwen3_moe": {**EXPERTS, "head_dim": 16},
    "deepseek_v3": {
        **{"n_routed_experts": 6, "num_experts_per_tok": 3, "n_group": 3, "topk_group": 2, "moe_intermediate_size": 48},
        **{"q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 12},
        **{"intermediate_size": 40, "first_k_dense_replace": 0, "num_key_value_heads": 4},
    },
    "granitemoehybrid": {
        **{"num_key_value_heads": 2, "shared_intermediate_size": 48, "num_local_experts": 0},
        **{"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 8},
        **{"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.4},
        **{"logits_scaling": 4.0, "rms_norm_eps": 1e-4, "position_embedding_type": "rope"},
        **{"tie_word_embeddings": True, "layer_types": ["full_attention"]},
    },
    "qwen3_5_text": {
        **{**GATED, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"]},
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8},
        "linear_value_head_dim": 8,
    },
    "llama4_text": {
        **{"intermediate_size_mlp": 48, "num_key_value_heads": 2, "head_dim": 12, "moe_layers": []},
        **{"no_rope_layer_interval": 2, "attention_chunk_size": 16, "floor_scale": 4},
    },
}
EVERY = FAMILIES | OTHERS
# One for each way that the code can go: RMS norms and LayerNorms in sequence, parallel branches, fused projections.
SAMPLE = ("llama", "opt", "phi", "phi3")
# Of these each MLP is several.
SPARSE = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3")
# Linears of theirs that stages on single linears leave alone.
ROUTERS = (".mlp.gate", ".mlp.shared_expert_gate", ".in_proj_a", ".in_proj_b")
# Of these the stock code gives the head a stream as wide as the embeddings.
ONE_END = ("gpt_bigcode", "codegen", "gptj")
# What configs of a family list for each block, over and over.
BY_BLOCK = {"layer_types"}
# What configs of a family do not have, not even as None.
UNKNOWN = {"codegen": ("pad_token_id",)}
# Granite 4.0 H's kind: Mamba layers in some blocks.
HYBRID: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
# A Llama with rows of whole blocks, as types of GGUF files take them.
IN_BLOCKS: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 16},
    **{"num_key_value_heads": 2, "attention_bias": False, "mlp_bias": False},
}
# OPT-350m's kind: norms of the stream behind the branches, embeddings narrower than the stream.
OPT_350M: dict[str, Any] = {"do_layer_norm_before": False, "word_embed_proj_dim": 16}


def tiny_config(model_type: str, **changes: Any) -> Any:
    shared = {name: value for name, value in SHARED.items() if name not in UNKNOWN.get(model_type, ())}
    sizes = shared | EVERY[model_type] | changes
    for key in BY_BLOCK & sizes.keys():
        sizes[key] = list(islice(cycle(sizes[key]), sizes["num_hidden_layers"]))
    return AutoConfig.for_model(model_type, **sizes)


def tiny_model(
    model_type: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A random model whose every parameter matters: gains, biases and offsets are drawn too."""
    torch.manual_seed(seed)
    # Torch's grouped products, the usual way to run experts, are not for float64.
    apart = {"experts_implementation": "eager"} if model_type in SPARSE else {}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes), dtype=dtype, **apart)
    gains = ("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight", "ln_attn.weight", "ln_mlp.weight")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.3 * torch.randn_like(parameter) + (1.0 if name.endswith(gains) else 0.0))
            else:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.copy_((0.1 * torch.randn_like(buffer)).float())
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, three special ones before them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<pad>"]
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.add_special_tokens(special)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def write_model(folder: Path, model_type: str, *, shard_size: str = "20KB", **options: Any) -> PreTrainedModel:
    """A tiny model with its tokenizer as a checkpoint folder, in several shards; the model is handed back."""
    model = tiny_model(model_type, **options)
    model.save_pretrained(folder, max_shard_size=shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return model


def write_text(file: Path, *, lines: int = 400, seed: int = 0) -> Path:
    """Text with some structure, long enough for a few dozen windows."""
    generator = torch.Generator().manual_seed(seed)
    words = ["alpha", "beta", "gamma", "delta", "return", "if", "else", "x", "y", "0", "1", "(", ")", ":", "="]
    picks = torch.randint(len(words), (lines, 8), generator=generator).tolist()
    file.write_text("\n".join(" ".join(words[i] for i in line) for line in picks), encoding="utf-8")
    return file
