"""Qwen2: biases on q, k and v.

Sliced, it is written as a Llama with attention_bias: engines take that one's head_dim from the config, and Qwen2's from
hidden_size / heads, which no longer holds.
"""

from typing import Any

from compress.families import Family, StockShape
from compress.families._blocks import ATTENTION, GATED_MLP


def not_stock(config: Any) -> str | None:
    return "its layers attend within a sliding window, which a Llama has not." if config.use_sliding_window else None


FAMILY = Family(
    branches=(ATTENTION, GATED_MLP),
    stock=StockShape(
        written_as="llama",
        adds={"attention_bias": True},
        zero_biases=("self_attn.o_proj",),
        heads_divide_width=True,
        not_stock=not_stock,
    ),
)
