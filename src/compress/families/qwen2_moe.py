"""Qwen2-MoE: biases on q, k and v, and beside the experts one that every token takes.

No engine takes its head_dim from the config, so a narrower one is no stock model.
"""

from typing import Any

from compress.families import Family
from compress.families._blocks import ATTENTION, ROUTER, SHARED_ROUTER, check_all_sparse, sparse_mlp


def family(config: Any) -> Family:
    check_all_sparse(config)
    experts = sparse_mlp(config.num_experts, count="moe_intermediate_size", shared=True)
    return Family(branches=(ATTENTION, experts), routers=(ROUTER, SHARED_ROUTER))
