"""GLM-4 (0414): GLM with a norm after each branch too."""

from dataclasses import replace

from compress.families import Family
from compress.families._blocks import ATTENTION, FUSED_MLP, behind_norm

FAMILY = Family(
    branches=(
        replace(ATTENTION, post_norm="post_self_attn_layernorm"),
        replace(FUSED_MLP, post_norm="post_mlp_layernorm"),
    ),
    not_exact=behind_norm,
)
