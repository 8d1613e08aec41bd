"""Cohere (Command R): one LayerNorm without an offset feeds attention and MLP, which run in parallel."""

from typing import Any

from compress.families import Family, StockShape
from compress.families._parallel import PARALLEL


def not_stock(config: Any) -> str | None:
    return "it normalizes queries and keys with the stream's epsilon (use_qk_norm)." if config.use_qk_norm else None


FAMILY = Family(
    branches=(PARALLEL,),
    norm="layer",
    norm_offset=False,
    norm_eps="layer_norm_eps",
    logits={"multiplier": "logit_scale"},
    stock=StockShape(not_stock=not_stock),
)
