"""Cohere (Command R): one LayerNorm without an offset feeds attention and MLP, which run in parallel."""

from dataclasses import replace
from typing import Any

from compress.families import StockShape
from compress.families._blocks import COHERE


def not_stock(config: Any) -> str | None:
    return "it normalizes queries and keys with the stream's epsilon (use_qk_norm)." if config.use_qk_norm else None


FAMILY = replace(COHERE, stock=StockShape(not_stock=not_stock))
