"""The sparse MLP that mixture-of-experts families share: a router, and gated MLPs of which each token takes a few."""

from typing import Any

from compress.errors import UnsupportedModel
from compress.families import BranchTable
from compress.families._sequential import neurons

ROUTER = "mlp.gate"
SHARED_ROUTER = "mlp.shared_expert_gate"


def expert(name: str, module: str, *, count: str | None) -> BranchTable:
    readers, writer = (f"{module}.gate_proj", f"{module}.up_proj"), f"{module}.down_proj"
    units = () if count is None else (neurons(*readers, writer=writer, count=count),)
    return BranchTable(name=name, norms=(), paths=((module,),), readers=readers, writers=(writer,), units=units)


def sparse_mlp(num_experts: int, *, count: str, shared: bool = False) -> BranchTable:
    """
    count: the config's key for an expert's neurons. shared: with an expert of every token, whose width is another.
    """
    experts = tuple(expert(f"expert {n}", f"mlp.expert.{n}", count=count) for n in range(num_experts))
    if shared:
        experts = (*experts, expert("shared expert", "mlp.shared_expert", count=None))
    return BranchTable(
        name="mlp",
        norms=("post_attention_layernorm",),
        paths=(("mlp",),),
        readers=(ROUTER, *([SHARED_ROUTER] if shared else []), *(name for each in experts for name in each.readers)),
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
