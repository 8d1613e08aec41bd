"""GPT-NeoX and Pythia: attention and MLP, each behind a LayerNorm of its own, in parallel or one after the other."""

from dataclasses import replace
from typing import Any

from compress.families import BranchTable, Family
from compress.families._sequential import neurons

ATTENTION = BranchTable(
    name="attention",
    norms=("input_layernorm",),
    paths=(("attention",),),
    readers=("attention.query_key_value",),
    writers=("attention.dense",),
)
MLP = BranchTable(
    name="mlp",
    norms=("post_attention_layernorm",),
    paths=(("mlp",),),
    readers=("mlp.dense_h_to_4h",),
    writers=("mlp.dense_4h_to_h",),
    units=(neurons("mlp.dense_h_to_4h", writer="mlp.dense_4h_to_h"),),
)
BOTH = BranchTable(
    name="parallel",
    norms=ATTENTION.norms + MLP.norms,
    paths=ATTENTION.paths + MLP.paths,
    readers=ATTENTION.readers + MLP.readers,
    writers=ATTENTION.writers + MLP.writers,
    units=MLP.units,
)
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
PARALLEL = replace(SEQUENTIAL, branches=(BOTH,))


def family(config: Any) -> Family:
    return PARALLEL if config.use_parallel_residual else SEQUENTIAL
