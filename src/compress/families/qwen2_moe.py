"""Qwen2-MoE: biases on q, k and v, and beside the experts one that every token takes.

No engine takes its head_dim from the config, so a narrower one is no stock model.
"""

from typing import Any

from compress.families import Family
from compress.families._blocks import (
    ATTENTION,
    GATED_MLP,
    ROUTER,
    SHARED_ROUTER,
    dense_blocks,
    sparse_mlp,
    with_dense_blocks,
)


def family(config: Any) -> Family:
    experts = sparse_mlp(config.num_experts, count="moe_intermediate_size", shared=True)
    branches, others = with_dense_blocks(ATTENTION, experts, GATED_MLP, dense_blocks(config), config.num_hidden_layers)
    return Family(branches=branches, others=others, routers=(ROUTER, SHARED_ROUTER))
