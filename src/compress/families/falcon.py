"""Falcon: attention and MLP in parallel behind one LayerNorm (7B) or one each (40B), or one after the other (RW)."""

from dataclasses import replace
from typing import Any

from compress.families import BranchTable, Family
from compress.families._sequential import neurons

ATTENTION = BranchTable(
    name="attention",
    norms=("input_layernorm",),
    paths=(("self_attention",),),
    readers=("self_attention.query_key_value",),
    writers=("self_attention.dense",),
)
MLP = BranchTable(
    name="mlp",
    norms=("post_attention_layernorm",),
    paths=(("mlp",),),
    readers=("mlp.dense_h_to_4h",),
    writers=("mlp.dense_4h_to_h",),
    units=(neurons("mlp.dense_h_to_4h", writer="mlp.dense_4h_to_h", count="ffn_hidden_size"),),
)
ONE_NORM = BranchTable(
    name="parallel",
    norms=("input_layernorm",),
    paths=ATTENTION.paths + MLP.paths,
    readers=ATTENTION.readers + MLP.readers,
    writers=ATTENTION.writers + MLP.writers,
    units=MLP.units,
)
TWO_NORMS = replace(ONE_NORM, norms=("ln_attn", "ln_mlp"))
PARALLEL = Family(
    embeddings=("transformer.word_embeddings",),
    blocks="transformer.h",
    branches=(ONE_NORM,),
    attention="self_attention",
    final_norm="transformer.ln_f",
    norm="layer",
    norm_eps="layer_norm_epsilon",
    dropout="hidden_dropout",
    returns_tuple=True,
)


def family(config: Any) -> Family:
    if config.new_decoder_architecture:
        one = config.num_ln_in_parallel_attn == 1  # None stands for 2
        return PARALLEL if one else replace(PARALLEL, branches=(TWO_NORMS,))
    return PARALLEL if config.parallel_attn else replace(PARALLEL, branches=(ATTENTION, MLP))
