from compress.families import Family, StockShape
from compress.families._blocks import ATTENTION, GATED_MLP

FAMILY = Family(branches=(ATTENTION, GATED_MLP), stock=StockShape())
