"""GPT-J: one LayerNorm feeds attention and MLP, which run in parallel; blocks return a tuple."""

from compress.families import BranchTable, Family
from compress.families._sequential import neurons

PARALLEL = BranchTable(
    name="parallel",
    norms=("ln_1",),
    paths=(("attn",), ("mlp",)),
    readers=("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"),
    writers=("attn.out_proj", "mlp.fc_out"),
    units=(neurons("mlp.fc_in", writer="mlp.fc_out", count="n_inner"),),
)
FAMILY = Family(
    embeddings=("transformer.wte",),
    blocks="transformer.h",
    branches=(PARALLEL,),
    attention="attn",
    final_norm="transformer.ln_f",
    head_bias=True,
    norm="layer",
    norm_eps="layer_norm_epsilon",
    returns_tuple=True,
    first_width_last=True,
)
