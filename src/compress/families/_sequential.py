"""The block that most families share: attention, then a gated MLP, each behind a norm of its own."""

from compress.families import BranchTable

ATTENTION = BranchTable(
    name="attention",
    norm="input_layernorm",
    paths=(("self_attn",),),
    readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    writers=("self_attn.o_proj",),
)
GATED_MLP = BranchTable(
    name="mlp",
    norm="post_attention_layernorm",
    paths=(("mlp",),),
    readers=("mlp.gate_proj", "mlp.up_proj"),
    writers=("mlp.down_proj",),
)
