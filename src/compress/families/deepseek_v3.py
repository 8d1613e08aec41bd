"""DeepSeek-V3, -R1 and what is built like them: latent attention (MLA), and many experts of which one is every token's.

The latents' second linears (q_b_proj, kv_b_proj) lie behind a norm of their own; they stay as they are. So do the
neurons: the shared expert's number is tied to the others'.
"""

from dataclasses import replace
from typing import Any

from compress.families import Family, StockShape
from compress.families._blocks import GATED_MLP, ROUTER, attention, sparse_mlp, with_dense_blocks


def family(config: Any) -> Family:
    query, inner = ("q_a_proj", ("q_b_proj", "kv_b_proj")) if config.q_lora_rank else ("q_proj", ("kv_b_proj",))
    latent = replace(
        attention("self_attn", query, "kv_a_proj_with_mqa", writer="o_proj"),
        inner=tuple(f"self_attn.{name}" for name in inner),
    )
    experts = sparse_mlp(config.n_routed_experts, count=None, shared=True, shared_router=False)
    dense = range(min(config.first_k_dense_replace, config.num_hidden_layers))
    branches, others = with_dense_blocks(latent, experts, GATED_MLP, dense, config.num_hidden_layers)
    return Family(branches=branches, others=others, routers=(ROUTER,), stock=StockShape())
