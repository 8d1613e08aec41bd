"""OLMo: LayerNorm without parameters and with a fixed epsilon; queries, keys and values may be clipped."""

from compress.families import Family, StockShape
from compress.families._blocks import ATTENTION, GATED_MLP

FAMILY = Family(
    branches=(ATTENTION, GATED_MLP),
    norm="layer",
    norm_gain=False,
    norm_offset=False,
    norm_eps=1e-5,  # OlmoLayerNorm's own: the config has no key for it.
    stock=StockShape(),
)
