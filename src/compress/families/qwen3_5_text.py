"""Qwen3.5's language model: three of four blocks have a gated recurrence (Gated DeltaNet) in place of the attention.

The recurrence's gates are a few rows that stages on linears leave alone.
"""

from dataclasses import replace
from typing import Any

from compress.families import Family, StockShape
from compress.families._blocks import ATTENTION, GATED_MLP, attention

GATES = ("linear_attn.in_proj_b", "linear_attn.in_proj_a")
FULL = (replace(ATTENTION, units=()), GATED_MLP)  # units are those of all blocks
LINEAR = (attention("linear_attn", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", writer="out_proj"), GATED_MLP)


def not_stock(config: Any) -> str:
    return "it normalizes what its recurrences give with the stream's epsilon."


def family(config: Any) -> Family:
    recurrent = [number for number, kind in enumerate(config.layer_types) if kind == "linear_attention"]
    return Family(
        branches=FULL,
        others=dict.fromkeys(recurrent, LINEAR),
        recurrent="linear_attn",
        norm="rms_plus_one",
        routers=GATES,
        stock=StockShape(not_stock=not_stock),
    )
