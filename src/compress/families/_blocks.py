"""The branches that families share, and short ways to write one of a family's own."""

from dataclasses import replace
from typing import Any

from compress.errors import UnsupportedModel
from compress.families import BranchTable, Family, Units

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


def sparse_mlp(num_experts: int, *, count: str, shared: bool = False) -> BranchTable:
    """A router, and gated MLPs of which each token takes a few.

    count: the config's key for an expert's neurons. shared: with an expert of every token, whose width is another.
    """
    experts = tuple(expert(f"expert {n}", f"mlp.expert.{n}", count=count) for n in range(num_experts))
    if shared:
        experts = (*experts, expert("shared expert", "mlp.shared_expert", count=None))
    routers = (ROUTER, SHARED_ROUTER) if shared else (ROUTER,)
    return BranchTable(
        name="mlp",
        norms=("post_attention_layernorm",),
        paths=(("mlp",),),
        readers=(*routers, *(name for each in experts for name in each.readers)),
        writers=tuple(name for each in experts for name in each.writers),
        units=tuple(units for each in experts for units in each.units),
        experts=experts,
    )


def check_all_sparse(config: Any) -> None:
    """Raises UnsupportedModel for a model whose blocks are not all alike."""
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        raise UnsupportedModel(
            f"Some blocks of this {config.model_type} model have experts and some a dense MLP (mlp_only_layers, "
            "decoder_sparse_step), which is not supported. Models whose blocks are all alike work."
        )
