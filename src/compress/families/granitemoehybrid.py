"""Granite 4's dense models: Granite's blocks, gate and up in one linear.

No engine takes its head_dim from the config, so a narrower one is no stock model.
"""

from typing import Any

from compress.families import Family
from compress.families._blocks import ATTENTION, mlp


def refused(config: Any) -> str | None:
    if set(config.layer_types) != {"full_attention"}:
        return "some of its blocks are Mamba layers, which have no attention (layer_types)."
    if config.num_local_experts:
        return "its blocks have experts beside a shared MLP (num_local_experts)."
    return None


MLP = mlp(
    "shared_mlp.input_linear",
    writer="shared_mlp.output_linear",
    path=("shared_mlp",),
    stacks=2,
    count="shared_intermediate_size",
)
FAMILY = Family(
    branches=(ATTENTION, MLP),
    multiplier="residual_multiplier",
    logits={"divisor": "logits_scaling"},
    refused=refused,
)
