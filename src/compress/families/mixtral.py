"""Mixtral: Mistral's attention, and experts whose shares add up to 1."""

from typing import Any

from compress.families import Family, StockShape
from compress.families._blocks import ATTENTION, ROUTER, sparse_mlp


def family(config: Any) -> Family:
    experts = sparse_mlp(config.num_local_experts, count="intermediate_size")
    return Family(branches=(ATTENTION, experts), routers=(ROUTER,), stock=StockShape())
