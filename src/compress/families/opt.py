"""OPT: LayerNorm, learned positions, an MLP without a module of its own. OPT-350m is post-norm and refused."""

from typing import Any

from compress.families import BranchTable, Family
from compress.families._sequential import neurons

ATTENTION = BranchTable(
    name="attention",
    norms=("self_attn_layer_norm",),
    paths=(("self_attn",),),
    readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    writers=("self_attn.out_proj",),
)
MLP = BranchTable(
    name="mlp",
    norms=("final_layer_norm",),
    paths=(("fc1", "activation_fn", "fc2"),),
    readers=("fc1",),
    writers=("fc2",),
    units=(neurons("fc1", writer="fc2", count="ffn_dim"),),
)


def not_exact(config: Any) -> str | None:
    if not config.do_layer_norm_before:
        return "it normalises after each branch (do_layer_norm_before=false, as OPT-350m). Other OPT sizes work."
    if config.word_embed_proj_dim != config.hidden_size:
        return "its embeddings are projected to the hidden size (word_embed_proj_dim differs). Other OPT sizes work."
    if config._remove_final_layer_norm:
        return "its head reads the stream without a norm (_remove_final_layer_norm=true)."
    return None


FAMILY = Family(
    embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    blocks="model.decoder.layers",
    branches=(ATTENTION, MLP),
    final_norm="model.decoder.final_layer_norm",
    norm="layer",
    norm_eps=1e-5,  # torch's default: OPT's config has no key for it.
    dropout="dropout",
    not_exact=not_exact,
)
