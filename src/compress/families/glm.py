"""GLM-4 (9B): gate and up in one linear, biases on q, k and v, rotary positions on a part of each head."""

from compress.families import Family, StockShape
from compress.families._blocks import ATTENTION, FUSED_MLP

FAMILY = Family(branches=(ATTENTION, FUSED_MLP), stock=StockShape())
