"""Falcon: attention and MLP in parallel after one LayerNorm (7B) or one each (40B), or one after the other (RW)."""

from dataclasses import replace
from typing import Any

from compress.families import Family
from compress.families._blocks import attention, mlp, parallel

ATTENTION = attention("self_attention", "query_key_value", writer="dense")
MLP = mlp("mlp.dense_h_to_4h", writer="mlp.dense_4h_to_h", count="ffn_hidden_size")
PARALLEL = Family(
    embeddings=("transformer.word_embeddings",),
    blocks="transformer.h",
    branches=(parallel(ATTENTION, MLP),),
    attention="self_attention",
    final_norm="transformer.ln_f",
    norm="layer",
    norm_eps="layer_norm_epsilon",
    dropout="hidden_dropout",
    returns_tuple=True,
)
TWO_NORMS = replace(PARALLEL, branches=(parallel(ATTENTION, MLP, norms=("ln_attn", "ln_mlp")),))


def family(config: Any) -> Family:
    if config.new_decoder_architecture:
        return PARALLEL if config.num_ln_in_parallel_attn == 1 else TWO_NORMS  # None stands for 2
    return PARALLEL if config.parallel_attn else replace(PARALLEL, branches=(ATTENTION, MLP))
