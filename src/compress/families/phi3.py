"""Phi-3: q, k, v in one linear, gate and up in another."""

from dataclasses import replace
from typing import Any

from compress.families import Family, StockShape
from compress.families._blocks import ATTENTION, FUSED_MLP


def not_stock(config: Any) -> str | None:
    if config.rope_parameters.get("rope_type") == "longrope":
        return "its config class checks the longrope factors against hidden_size / heads, which no longer holds."
    return None


FAMILY = Family(
    branches=(replace(ATTENTION, readers=("self_attn.qkv_proj",), units=()), FUSED_MLP),
    dropout="resid_pdrop",
    stock=StockShape(not_stock=not_stock),
)
