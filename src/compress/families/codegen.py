"""CodeGen: one LayerNorm feeds attention and MLP, which run in parallel; blocks return a tuple."""

from compress.families import Family
from compress.families._blocks import attention, mlp, parallel

FAMILY = Family(
    embeddings=("transformer.wte",),
    blocks="transformer.h",
    branches=(
        parallel(
            attention("attn", "qkv_proj", writer="out_proj", norm="ln_1"),
            mlp("mlp.fc_in", writer="mlp.fc_out", count="n_inner"),
        ),
    ),
    attention="attn",
    final_norm="transformer.ln_f",
    head_bias=True,
    norm="layer",
    norm_eps="layer_norm_epsilon",
    returns_tuple=True,
    first_width_last=True,
)
