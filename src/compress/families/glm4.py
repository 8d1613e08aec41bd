"""GLM-4 (0414): GLM with a norm behind each branch too."""

from dataclasses import replace

from compress.families import Family
from compress.families._post_norm import not_exact
from compress.families._sequential import ATTENTION, GATED_MLP, neurons

FAMILY = Family(
    branches=(
        replace(ATTENTION, post_norm="post_self_attn_layernorm"),
        replace(
            GATED_MLP,
            readers=("mlp.gate_up_proj",),
            units=(neurons("mlp.gate_up_proj", writer="mlp.down_proj", stacks=2),),
            post_norm="post_mlp_layernorm",
        ),
    ),
    not_exact=not_exact,
)
