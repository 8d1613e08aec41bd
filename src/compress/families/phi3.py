"""Phi-3: q, k, v in one linear, gate and up in another."""

from dataclasses import replace

from compress.families import Family
from compress.families._sequential import ATTENTION, GATED_MLP

FAMILY = Family(
    branches=(
        replace(ATTENTION, readers=("self_attn.qkv_proj",)),
        replace(GATED_MLP, readers=("mlp.gate_up_proj",)),
    ),
    dropout="resid_pdrop",
)
