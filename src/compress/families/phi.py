"""Phi-1, 1.5 and 2: one LayerNorm feeds attention and MLP, which run in parallel; everything has a bias."""

from typing import Any

from compress.families import BranchTable, Family, StockShape
from compress.families._sequential import QKV, kv_groups, neurons


def not_stock(config: Any) -> str | None:
    return "it normalizes queries and keys at hidden_size / heads (qk_layernorm)." if config.qk_layernorm else None


PARALLEL = BranchTable(
    name="parallel",
    norms=("input_layernorm",),
    paths=(("self_attn",), ("mlp",)),
    readers=(*QKV, "mlp.fc1"),
    writers=("self_attn.dense", "mlp.fc2"),
    units=(kv_groups("self_attn.dense"), neurons("mlp.fc1", writer="mlp.fc2")),
)
FAMILY = Family(
    branches=(PARALLEL,),
    final_norm="model.final_layernorm",
    head_bias=True,
    norm="layer",
    norm_eps="layer_norm_eps",
    dropout="resid_pdrop",
    stock=StockShape(not_stock=not_stock),
)
