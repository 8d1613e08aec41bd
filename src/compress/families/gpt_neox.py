"""GPT-NeoX and Pythia: attention and MLP, each after a LayerNorm of its own, in parallel or one after the other."""

from dataclasses import replace
from typing import Any

from compress.families import Family
from compress.families._blocks import attention, mlp, parallel

ATTENTION = attention("attention", "query_key_value", writer="dense")
MLP = mlp("mlp.dense_h_to_4h", writer="mlp.dense_4h_to_h")
SEQUENTIAL = Family(
    embeddings=("gpt_neox.embed_in",),
    blocks="gpt_neox.layers",
    branches=(ATTENTION, MLP),
    attention="attention",
    final_norm="gpt_neox.final_layer_norm",
    norm="layer",
    norm_eps="layer_norm_eps",
    dropout="hidden_dropout",
)
PARALLEL = replace(SEQUENTIAL, branches=(parallel(ATTENTION, MLP, norms=ATTENTION.norms + MLP.norms),))


def family(config: Any) -> Family:
    return PARALLEL if config.use_parallel_residual else SEQUENTIAL
