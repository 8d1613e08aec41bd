"""Gemma: gains stored as 1 + w, and embeddings scaled by sqrt(hidden size), which any rotation passes."""

from compress.families import Family, StockShape
from compress.families._blocks import ATTENTION, GATED_MLP

FAMILY = Family(branches=(ATTENTION, GATED_MLP), norm="rms_plus_one", stock=StockShape())
