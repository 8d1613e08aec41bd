"""Qwen3: queries and keys have norms of their own, whose epsilon is the stream's."""

from compress.families import Family, StockShape
from compress.families._blocks import ATTENTION, GATED_MLP, NORMED_HEADS

FAMILY = Family(branches=(ATTENTION, GATED_MLP), stock=StockShape(normed_readers=NORMED_HEADS))
