"""GPTBigCode (SantaCoder, StarCoder): GPT-2's blocks, as a rule with one key and value head for all queries."""

from typing import Any

from compress.families import BranchTable, Family
from compress.families._sequential import neurons

ATTENTION = BranchTable(
    name="attention",
    norms=("ln_1",),
    paths=(("attn",),),
    readers=("attn.c_attn",),
    writers=("attn.c_proj",),
)
MLP = BranchTable(
    name="mlp",
    norms=("ln_2",),
    paths=(("mlp",),),
    readers=("mlp.c_fc",),
    writers=("mlp.c_proj",),
    units=(neurons("mlp.c_fc", writer="mlp.c_proj", count="n_inner"),),
)


def refused(config: Any) -> str | None:
    return "its blocks read an encoder's output too (add_cross_attention=true)." if config.add_cross_attention else None


FAMILY = Family(
    embeddings=("transformer.wte", "transformer.wpe"),
    blocks="transformer.h",
    branches=(ATTENTION, MLP),
    attention="attn",
    final_norm="transformer.ln_f",
    norm="layer",
    norm_eps="layer_norm_epsilon",
    first_width_last=True,
    refused=refused,
)
