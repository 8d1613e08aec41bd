"""Granite: Llama with multipliers on embeddings, attention scores, what branches write, and logits."""

from compress.families import Family, StockShape
from compress.families._blocks import ATTENTION, GATED_MLP

FAMILY = Family(
    branches=(ATTENTION, GATED_MLP),
    multiplier="residual_multiplier",
    logits={"divisor": "logits_scaling"},
    stock=StockShape(),
)
