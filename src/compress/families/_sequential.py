"""The block that most families share: attention, then a gated MLP, each after its own norm."""

from compress.families import BranchTable, Units

# Readers whose outputs have a norm of their own, a head at a time, and those norms.
NORMED_HEADS = (("self_attn.q_proj", "self_attn.q_norm"), ("self_attn.k_proj", "self_attn.k_norm"))
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def kv_groups(writer: str) -> Units:
    """Groups of query heads that share a key and a value head, for separate q, k and v linears."""
    readers = tuple((name, 1) for name in QKV)
    return Units(kind="kv_groups", count="num_key_value_heads", readers=readers, writer=writer)


def neurons(*readers: str, writer: str, stacks: int = 1, count: str = "intermediate_size") -> Units:
    return Units(kind="neurons", count=count, readers=tuple((name, stacks) for name in readers), writer=writer)


ATTENTION = BranchTable(
    name="attention",
    norms=("input_layernorm",),
    paths=(("self_attn",),),
    readers=QKV,
    writers=("self_attn.o_proj",),
    units=(kv_groups("self_attn.o_proj"),),
)
GATED_MLP = BranchTable(
    name="mlp",
    norms=("post_attention_layernorm",),
    paths=(("mlp",),),
    readers=("mlp.gate_proj", "mlp.up_proj"),
    writers=("mlp.down_proj",),
    units=(neurons("mlp.gate_proj", "mlp.up_proj", writer="mlp.down_proj"),),
)
