"""Qwen3-MoE: Qwen3's attention, and many small experts."""

from typing import Any

from compress.families import Family, StockShape
from compress.families._blocks import ATTENTION, NORMED_HEADS, ROUTER, check_all_sparse, sparse_mlp


def family(config: Any) -> Family:
    check_all_sparse(config)
    experts = sparse_mlp(config.num_experts, count="moe_intermediate_size")
    return Family(branches=(ATTENTION, experts), routers=(ROUTER,), stock=StockShape(normed_readers=NORMED_HEADS))
