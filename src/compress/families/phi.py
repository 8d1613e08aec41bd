"""Phi-1, 1.5 and 2: one LayerNorm feeds attention and MLP, which run in parallel; everything has a bias."""

from dataclasses import replace
from typing import Any

from compress.families import Family, StockShape
from compress.families._blocks import attention, kv_groups, mlp, parallel


def not_stock(config: Any) -> str | None:
    return "it normalizes queries and keys at hidden_size / heads (qk_layernorm)." if config.qk_layernorm else None


ATTENTION = replace(
    attention("self_attn", "q_proj", "k_proj", "v_proj", writer="dense"), units=(kv_groups("self_attn.dense"),)
)
FAMILY = Family(
    branches=(parallel(ATTENTION, mlp("mlp.fc1", writer="mlp.fc2")),),
    final_norm="model.final_layernorm",
    head_bias=True,
    norm="layer",
    norm_eps="layer_norm_eps",
    dropout="resid_pdrop",
    stock=StockShape(not_stock=not_stock),
)
