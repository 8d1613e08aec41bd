"""GLM-4 (9B): gate and up in one linear, biases on q, k and v, rotary positions on a part of each head."""

from dataclasses import replace

from compress.families import Family, StockShape
from compress.families._sequential import ATTENTION, GATED_MLP, neurons

FAMILY = Family(
    branches=(
        ATTENTION,
        replace(
            GATED_MLP,
            readers=("mlp.gate_up_proj",),
            units=(neurons("mlp.gate_up_proj", writer="mlp.down_proj", stacks=2),),
        ),
    ),
    stock=StockShape(),
)
