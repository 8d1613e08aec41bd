"""OPT: LayerNorm, learned positions, an MLP without a module of its own; OPT-350m normalizes after each branch."""

from dataclasses import replace
from typing import Any

from compress.families import BranchTable, Family
from compress.families._blocks import attention, mlp

ATTENTION = attention("self_attn", "q_proj", "k_proj", "v_proj", writer="out_proj", norm="self_attn_layer_norm")
MLP = mlp("fc1", writer="fc2", norm="final_layer_norm", path=("fc1", "activation_fn", "fc2"), count="ffn_dim")


def not_exact(config: Any) -> str | None:
    if not config.do_layer_norm_before:
        return "it normalizes the stream after each branch (do_layer_norm_before=false, as OPT-350m)."
    if config.word_embed_proj_dim != config.hidden_size:
        return "its embeddings are projected to the hidden size (word_embed_proj_dim differs)."
    if config._remove_final_layer_norm:
        return "its head reads the stream without a norm (_remove_final_layer_norm=true)."
    return None


def post_norm(branch: BranchTable) -> BranchTable:
    return replace(branch, norms=(), post_norm=branch.norms[0], post_norm_of="stream")


def family(config: Any) -> Family:
    decoder, pre_norm = "model.decoder", config.do_layer_norm_before
    is_projected = config.word_embed_proj_dim != config.hidden_size
    has_final_norm = pre_norm and not config._remove_final_layer_norm
    return Family(
        embeddings=(f"{decoder}.embed_tokens", f"{decoder}.embed_positions"),
        blocks=f"{decoder}.layers",
        branches=(ATTENTION, MLP) if pre_norm else (post_norm(ATTENTION), post_norm(MLP)),
        final_norm=f"{decoder}.final_layer_norm" if has_final_norm else None,
        project_in=f"{decoder}.project_in" if is_projected else None,
        project_out=f"{decoder}.project_out" if is_projected else None,
        norm="layer",
        norm_gain=config.layer_norm_elementwise_affine,
        norm_offset=config.layer_norm_elementwise_affine,
        norm_eps=1e-5,  # torch's default: OPT's config has no key for it.
        dropout="dropout",
        not_exact=not_exact,
    )
