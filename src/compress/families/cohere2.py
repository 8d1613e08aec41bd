"""Cohere 2 (Command R7B): Cohere with sliding windows; its config sets the heads' size to hidden_size / heads."""

from compress.families import Family
from compress.families._parallel import PARALLEL

FAMILY = Family(
    branches=(PARALLEL,),
    norm="layer",
    norm_offset=False,
    norm_eps="layer_norm_eps",
    logits={"multiplier": "logit_scale"},
)
