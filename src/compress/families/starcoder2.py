"""StarCoder2: LayerNorm before attention and before an MLP without a gate, biases, grouped-query attention."""

from typing import Any

from compress.families import Family, StockShape
from compress.families._blocks import ATTENTION, mlp


def not_stock(config: Any) -> str | None:
    return None if config.use_bias else "its linears have no bias that could hold the norms' offsets (use_bias=false)."


FAMILY = Family(
    branches=(ATTENTION, mlp("mlp.c_fc", writer="mlp.c_proj")),
    norm="layer",
    norm_eps="norm_epsilon",
    stock=StockShape(constant_channel=True, not_stock=not_stock),
)
