"""OLMo 2: branches read the stream as it is, and what they write is normalized; so are queries and keys."""

from dataclasses import replace

from compress.families import Family
from compress.families._post_norm import not_exact
from compress.families._sequential import ATTENTION, GATED_MLP

FAMILY = Family(
    branches=(
        replace(ATTENTION, norms=(), post_norm="post_attention_layernorm"),
        replace(GATED_MLP, norms=(), post_norm="post_feedforward_layernorm"),
    ),
    not_exact=not_exact,
)
