"""Qwen3-MoE: Qwen3's attention, and many small experts."""

from typing import Any

from compress.families import Family, StockShape
from compress.families._blocks import (
    ATTENTION,
    GATED_MLP,
    NORMED_HEADS,
    ROUTER,
    dense_blocks,
    sparse_mlp,
    with_dense_blocks,
)


def family(config: Any) -> Family:
    experts = sparse_mlp(config.num_experts, count="moe_intermediate_size")
    branches, others = with_dense_blocks(ATTENTION, experts, GATED_MLP, dense_blocks(config), config.num_hidden_layers)
    stock = StockShape(normed_readers=NORMED_HEADS)
    return Family(branches=branches, others=others, routers=(ROUTER,), stock=stock)
