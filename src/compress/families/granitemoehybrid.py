"""Granite 4's dense models: Granite's blocks, gate and up in one linear; some blocks may be Mamba layers.

No engine takes its head_dim from the config, so a narrower one is no stock model.
"""

from dataclasses import replace
from typing import Any

from compress.families import Family
from compress.families._blocks import ATTENTION, attention, mlp


def refused(config: Any) -> str | None:
    return "its blocks have experts beside a shared MLP (num_local_experts)." if config.num_local_experts else None


MLP = mlp(
    "shared_mlp.input_linear",
    writer="shared_mlp.output_linear",
    path=("shared_mlp",),
    stacks=2,
    count="shared_intermediate_size",
)
MAMBA = (attention("mamba", "in_proj", writer="out_proj"), MLP)


def family(config: Any) -> Family:
    recurrent = [number for number, kind in enumerate(config.layer_types) if kind == "linear_attention"]
    return Family(
        branches=(replace(ATTENTION, units=()) if recurrent else ATTENTION, MLP),  # units are those of all blocks
        others=dict.fromkeys(recurrent, MAMBA),
        recurrent="mamba" if recurrent else None,
        multiplier="residual_multiplier",
        logits={"divisor": "logits_scaling"},
        refused=refused,
    )
