"""Phi-1, 1.5 and 2: one LayerNorm feeds attention and MLP, which run in parallel; everything has a bias."""

from compress.families import BranchTable, Family

PARALLEL = BranchTable(
    name="parallel",
    norm="input_layernorm",
    paths=(("self_attn",), ("mlp",)),
    readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"),
    writers=("self_attn.dense", "mlp.fc2"),
)
FAMILY = Family(
    branches=(PARALLEL,),
    final_norm="model.final_layernorm",
    head_bias=True,
    norm="layer",
    norm_eps="layer_norm_eps",
    dropout="resid_pdrop",
)
