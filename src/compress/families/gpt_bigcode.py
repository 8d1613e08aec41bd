"""GPTBigCode (SantaCoder, StarCoder): GPT-2's blocks, as a rule with one key and value head for all queries."""

from typing import Any

from compress.families import Family
from compress.families._blocks import attention, mlp


def refused(config: Any) -> str | None:
    return "its blocks read an encoder's output too (add_cross_attention=true)." if config.add_cross_attention else None


FAMILY = Family(
    embeddings=("transformer.wte", "transformer.wpe"),
    blocks="transformer.h",
    branches=(
        attention("attn", "c_attn", writer="c_proj", norm="ln_1"),
        mlp("mlp.c_fc", writer="mlp.c_proj", norm="ln_2", count="n_inner"),
    ),
    attention="attn",
    final_norm="transformer.ln_f",
    norm="layer",
    norm_eps="layer_norm_epsilon",
    first_width_last=True,
    refused=refused,
)
