"""Qwen3: queries and keys have norms of their own, whose epsilon is the stream's."""

from compress.families import Family, StockShape
from compress.families._sequential import ATTENTION, GATED_MLP

NORMED = (("self_attn.q_proj", "self_attn.q_norm"), ("self_attn.k_proj", "self_attn.k_norm"))
FAMILY = Family(branches=(ATTENTION, GATED_MLP), stock=StockShape(normed_readers=NORMED))
