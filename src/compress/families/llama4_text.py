"""Llama 4's language model without experts, as MobileLLM-R1: Llama, with norms of queries and keys in some layers."""

from typing import Any

from compress.families import Family, StockShape
from compress.families._blocks import ATTENTION, mlp


def refused(config: Any) -> str | None:
    return "its blocks have experts (moe_layers)." if config.moe_layers else None


def not_stock(config: Any) -> str | None:
    return "it normalizes queries and keys with the stream's epsilon (use_qk_norm)." if config.use_qk_norm else None


MLP = mlp(
    "feed_forward.gate_proj",
    "feed_forward.up_proj",
    writer="feed_forward.down_proj",
    path=("feed_forward",),
    count="intermediate_size_mlp",
)
FAMILY = Family(branches=(ATTENTION, MLP), stock=StockShape(not_stock=not_stock), refused=refused)
