"""Gemma 3's language model: Gemma 2's blocks, with norms of queries and keys."""

from dataclasses import replace

from compress.families import Family
from compress.families._post_norm import not_exact
from compress.families._sequential import ATTENTION, GATED_MLP

FAMILY = Family(
    branches=(
        replace(ATTENTION, post_norm="post_attention_layernorm"),
        replace(GATED_MLP, norms=("pre_feedforward_layernorm",), post_norm="post_feedforward_layernorm"),
    ),
    norm="rms_plus_one",
    logits={"softcap": "final_logit_softcapping"},
    not_exact=not_exact,
)
