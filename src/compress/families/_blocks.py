"""The branches that families share, and short ways to write one of a family's own."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from compress.families import BranchTable, Family, Units

Branches = tuple[BranchTable, ...]
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# Readers whose outputs have a norm of their own, a head at a time, and those norms.
NORMED_HEADS = (("self_attn.q_proj", "self_attn.q_norm"), ("self_attn.k_proj", "self_attn.k_norm"))
ROUTER, SHARED_ROUTER = "mlp.gate", "mlp.shared_expert_gate"


def kv_groups(writer: str) -> Units:
    """Groups of query heads that share a key and a value head, for separate q, k and v linears."""
    readers = tuple((name, 1) for name in QKV)
    return Units(kind="kv_groups", count="num_key_value_heads", readers=readers, writer=writer)


def neurons(*readers: str, writer: str, stacks: int = 1, count: str = "intermediate_size") -> Units:
    return Units(kind="neurons", count=count, readers=tuple((name, stacks) for name in readers), writer=writer)


def attention(module: str, *readers: str, writer: str, norm: str = "input_layernorm") -> BranchTable:
    """Attention whose linears are named below its module, and whose heads stay."""
    names = tuple(f"{module}.{name}" for name in readers)
    return BranchTable(
        name="attention", norms=(norm,), paths=((module,),), readers=names, writers=(f"{module}.{writer}",)
    )


def mlp(
    *readers: str,
    writer: str,
    norm: str = "post_attention_layernorm",
    path: tuple[str, ...] = ("mlp",),
    stacks: int = 1,
    count: str = "intermediate_size",
) -> BranchTable:
    """An MLP whose neurons can be deleted. stacks, count: as `Units` has them."""
    units = neurons(*readers, writer=writer, stacks=stacks, count=count)
    return BranchTable(name="mlp", norms=(norm,), paths=(path,), readers=readers, writers=(writer,), units=(units,))


def parallel(first: BranchTable, second: BranchTable, *, norms: tuple[str, ...] | None = None) -> BranchTable:
    """Both from the same stream; by default through the norm of the first."""
    return BranchTable(
        name="parallel",
        norms=first.norms if norms is None else norms,
        paths=first.paths + second.paths,
        readers=first.readers + second.readers,
        writers=first.writers + second.writers,
        units=first.units + second.units,
    )


ATTENTION = replace(
    attention("self_attn", "q_proj", "k_proj", "v_proj", writer="o_proj"), units=(kv_groups("self_attn.o_proj"),)
)
GATED_MLP = mlp("mlp.gate_proj", "mlp.up_proj", writer="mlp.down_proj")
FUSED_MLP = mlp("mlp.gate_up_proj", writer="mlp.down_proj", stacks=2)  # gate and up in one linear
PARALLEL = parallel(ATTENTION, GATED_MLP)


def behind_norm(config: Any) -> str:
    """Why families that normalize a branch's output before it is added to the stream are not exact."""
    return "it normalizes what a branch writes (post-norm), which a rotation of the stream does not pass."


COHERE = Family(
    branches=(PARALLEL,),
    norm="layer",
    norm_offset=False,
    norm_eps="layer_norm_eps",
    logits={"multiplier": "logit_scale"},
)
GEMMA2 = Family(
    branches=(
        replace(ATTENTION, post_norm="post_attention_layernorm"),
        replace(GATED_MLP, norms=("pre_feedforward_layernorm",), post_norm="post_feedforward_layernorm"),
    ),
    norm="rms_plus_one",
    logits={"softcap": "final_logit_softcapping"},
    not_exact=behind_norm,
)
OLMO2 = Family(
    branches=(
        replace(ATTENTION, norms=(), post_norm="post_attention_layernorm"),
        replace(GATED_MLP, norms=(), post_norm="post_feedforward_layernorm"),
    ),
    not_exact=behind_norm,
)


def expert(name: str, module: str, *, count: str | None) -> BranchTable:
    table = mlp(
        f"{module}.gate_proj", f"{module}.up_proj", writer=f"{module}.down_proj", path=(module,), count=str(count)
    )
    return replace(table, name=name, norms=(), units=table.units if count else ())


def sparse_mlp(num_experts: int, *, count: str | None, shared: bool = False, shared_router: bool = True) -> BranchTable:
    """A router, and gated MLPs of which each token takes a few.

    count: the config's key for an expert's neurons; None where they are no units. shared: with an expert of every
        token, whose width is another. shared_router: its share is decided too.
    """
    experts = tuple(expert(f"expert {n}", f"mlp.expert.{n}", count=count) for n in range(num_experts))
    if shared:
        experts = (*experts, expert("shared expert", "mlp.shared_expert", count=None))
    routers = (ROUTER, SHARED_ROUTER) if shared and shared_router else (ROUTER,)
    return BranchTable(
        name="mlp",
        norms=("post_attention_layernorm",),
        paths=(("mlp",),),
        readers=(*routers, *(name for each in experts for name in each.readers)),
        writers=tuple(name for each in experts for name in each.writers),
        units=tuple(units for each in experts for units in each.units),
        experts=experts,
    )


def with_dense_blocks(
    attention: BranchTable, sparse: BranchTable, dense: BranchTable, numbers: Collection[int], num_blocks: int
) -> tuple[Branches, dict[int, Branches]]:
    """The branches of blocks with experts, and those of the blocks of these numbers, which have a dense MLP.

    Where there are both, their neurons are not units: one number of them is of no use to both.
    """
    if not numbers:
        return (attention, sparse), {}
    if len(numbers) == num_blocks:
        return (attention, dense), {}
    experts = tuple(replace(each, units=()) for each in sparse.experts)
    plain = (attention, replace(dense, units=()))
    return (attention, replace(sparse, units=(), experts=experts)), dict.fromkeys(sorted(numbers), plain)


def dense_blocks(config: Any) -> list[int]:
    """The numbers of the blocks of a Qwen MoE that have a dense MLP."""
    numbers, step = range(config.num_hidden_layers), config.decoder_sparse_step
    return [n for n in numbers if n in (config.mlp_only_layers or ()) or not config.num_experts or (n + 1) % step]
