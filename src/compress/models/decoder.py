"""A causal LM of which one part at a time is loaded.

The stock model is built on the meta device, where it costs nothing, and its parts (the embeddings, one decoder block,
the head) are filled, used and emptied in turn. Stock code does all the computing: nothing of it is copied here.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from compress.families import BranchTable, Family, Units
from compress.models.branch import Branch, Writer
from compress.models.soundness import check_sound, first_unsound
from compress.models.untrusted import reading
from compress.own_model.modeling_compress import (
    SparseMLP,
    as_residual_block,
    finished_logits,
    replace,
    shortcut_name,
    unfuse_experts,
)

Arguments = dict[str, Any]


class Recorder(nn.Module):
    """Stand in for a decoder block: record its keyword arguments and return the hidden states unchanged."""

    def __init__(self, *, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple
        self.arguments: Arguments = {}
        self.hidden_states: Tensor | None = None

    def forward(self, hidden_states: Tensor, *_nothing: None, **arguments: Any) -> Tensor | tuple[Tensor]:
        # GPTBigCode also hands on, by its place, an encoder's output that it does not have.
        self.hidden_states = hidden_states
        self.arguments = {name: value for name, value in arguments.items() if name != "use_cache"}
        return (hidden_states,) if self.returns_tuple else hidden_states


class Decoder:
    """The parts of a causal LM, on the meta device until their tensors are given."""

    def __init__(self, config: Any, family: Family, *, dtype: torch.dtype, device: torch.device) -> None:
        # A copy: transformers notes the dtype and the attention it was asked for in the config it is given.
        self.config = copy.deepcopy(config)
        self.family = family
        self.dtype = dtype
        self.device = device
        self.structure = family.structure()
        said = "The model's config.json makes no model"
        with reading(said), no_init_weights(), init_empty_weights(include_buffers=False):
            self.model = unfuse_experts(AutoModelForCausalLM.from_config(self.config, dtype=dtype)).eval()
        self.blocks = list(self.model.get_submodule(family.blocks))
        for block in self.blocks:
            # No stock loop runs them here; whoever does wants the stream alone.
            as_residual_block(block, {**self.structure, "returns_tuple": False}, config)
        self.recorders = [Recorder(returns_tuple=family.returns_tuple) for _ in self.blocks]
        for owner in self.model.modules():
            for name, buffer in owner.named_buffers(recurse=False):
                setattr(owner, name, buffer.to(device))

    @property
    def dense_width(self) -> int:
        return int(self.config.hidden_size)

    def parameter_shapes(self) -> dict[str, torch.Size]:
        """Shapes of the dense model's parameters; a tied head is listed under its own name."""
        shapes = {name: p.shape for name, p in self.model.named_parameters(remove_duplicate=False)}
        return dict(sorted(shapes.items()))

    def embedding_names(self) -> list[str]:
        """The first is the table that a tied head shares."""
        return [f"{part}.weight" for part in self.family.embedding_parts]

    def block_names(self, index: int) -> list[str]:
        return [f"{self.block_prefix(index)}{name}" for name, _ in self.blocks[index].named_parameters()]

    def head_names(self) -> list[str]:
        parts = self.family.head_parts
        return [f"{part}.{name}" for part in parts for name, _ in self.model.get_submodule(part).named_parameters()]

    def block_prefix(self, index: int) -> str:
        return f"{self.family.blocks}.{index}."

    def fill(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Load a part's weights, by their names below it, in the compute dtype and on the device."""
        for name, tensor in tensors.items():
            owner, _, attribute = name.rpartition(".")
            weight = tensor.to(self.device, self.dtype)
            setattr(module.get_submodule(owner), attribute, nn.Parameter(weight, requires_grad=False))

    def fill_root(self, tensors: Mapping[str, Tensor], *, part: str) -> None:
        below = {
            name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")
        }
        self.fill(self.model.get_submodule(part), below)

    def embedding_branch(self) -> Branch:
        tables: dict[str, Writer] = {name: embedding(self.model, name) for name in self.family.embeddings}
        return Branch(name="embeddings", readers={}, writers=tables, **self._norm_facts())

    def block_branches(self, index: int) -> list[Branch]:
        return [self._block_branch(index, table) for table in self.family.branches]

    def head_branch(self) -> Branch:
        reader = self.family.last_reader
        return Branch(
            name="head",
            readers={reader: linear(self.model, reader)},
            writers={},
            owner=self.model,
            norms={self.family.final_norm: (reader,)},
            **self._norm_facts(),
        )

    def embed(self, ids: Int64[Tensor, "batch tokens"]) -> tuple[Float[Tensor, "batch tokens d"], list[Arguments]]:
        """Compute the stream before the first block and the other arguments of each block."""
        hidden_states, arguments = embedded(self.model, self.family, self.recorders, ids.to(self.device))
        check_sound(hidden_states, "the embeddings")
        return hidden_states, arguments

    def logits(self, hidden_states: Float[Tensor, "batch tokens d"]) -> Float[Tensor, "batch tokens vocabulary"]:
        final_norm = self.family.final_norm
        normed = self.model.get_submodule(final_norm)(hidden_states) if final_norm else hidden_states
        found = self.logits_of(self.model.get_submodule(self.family.last_reader)(normed))
        check_sound(found, "the logits")
        return found

    def logits_of(self, read: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens vocabulary"]:
        """Compute the logits from the output of the last reader of the stream."""
        outputs = self.model.get_submodule(self.family.head)(read) if self.family.project_out else read
        return finished_logits(outputs, self.family.logits, self.config)

    def empty(self, module: nn.Module) -> None:
        """Free a part's weights."""
        for owner in module.modules():
            for name, parameter in list(owner.named_parameters(recurse=False)):
                setattr(owner, name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def _norm_facts(self) -> dict[str, Any]:
        epsilon = self.family.epsilon(self.config)
        return {"norm_kind": self.family.norm, "norm_eps": epsilon, "dense_width": self.dense_width}

    def _block_branch(self, index: int, table: BranchTable) -> Branch:
        block = self.blocks[index]
        names = next(branch for branch in self.structure["branches"] if branch["name"] == table.name)
        name = f"block {index} {table.name}"
        return Branch(
            name=name,
            readers={reader: linear(block, reader) for reader in table.readers},
            writers={writer: linear(block, writer) for writer in table.writers},
            owner=block,
            norms=table.readers_by_norm(),
            shortcut_name=shortcut_name(names),
            scale=self.family.scale(self.config),
            post_norm=table.post_norm,
            post_norm_of=table.post_norm_of,
            units=self._units(table),
            experts=tuple(self._expert(index, expert) for expert in table.experts),
            sparse=sparse_mlp(block, table),
            run=partial(run_branch, block, names, name),
            **self._norm_facts(),
        )

    def _expert(self, index: int, table: BranchTable) -> Branch:
        block = self.blocks[index]
        return Branch(
            name=f"block {index} {table.name}",
            readers={reader: linear(block, reader) for reader in table.readers},
            writers={writer: linear(block, writer) for writer in table.writers},
            owner=block,
            units=self._units(table),
            **self._norm_facts(),
        )

    def _units(self, table: BranchTable) -> dict[str, tuple[Units, int]]:
        return {units.kind: (units, units.number(self.config)) for units in table.units}


def embedded(
    model: PreTrainedModel, family: Family, recorders: Sequence[Recorder], ids: Int64[Tensor, "batch tokens"]
) -> tuple[Float[Tensor, "batch tokens d"], list[Arguments]]:
    """Compute the stream before the first block and the other arguments of each block, by a recorder a block."""
    with recording(model, family, recorders):
        model.base_model(input_ids=ids, use_cache=False)
    hidden_states = recorders[0].hidden_states
    if hidden_states is None:
        raise RuntimeError("The stock model did not call its first block.")
    return hidden_states, [recorder.arguments for recorder in recorders]


@contextmanager
def recording(model: nn.Module, family: Family, recorders: Sequence[Recorder]) -> Iterator[None]:
    """Replace a stock model's blocks by recorders and the modules after them by identities."""
    behind = [part for part in family.head_parts if part != family.head]
    kept = {name: model.get_submodule(name) for name in (family.blocks, *behind)}
    replace(model, family.blocks, nn.ModuleList(recorders))
    for name in behind:
        replace(model, name, nn.Identity())
    try:
        yield
    finally:
        for name, module in kept.items():
            replace(model, name, module)


def run_branch(
    block: Any, structure: Mapping[str, Any], name: str, hidden_states: Tensor, arguments: Arguments
) -> Tensor:
    """Run a branch; return what it adds to the stream. structure: the names of the block's parts."""
    found: Tensor = block.run_branch(structure, hidden_states, **arguments)
    where = partial(first_unsound, block, partial(block.run_branch, structure, hidden_states, **arguments))
    check_sound(found, f"the stream after {name}", where)
    return found


def sparse_mlp(block: nn.Module, table: BranchTable) -> SparseMLP | None:
    modules = (block.get_submodule(step) for path in table.paths for step in path)
    return next((module for module in modules if isinstance(module, SparseMLP)), None)


def linear(root: nn.Module, name: str) -> nn.Linear:
    module = root.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"The family's table calls {name} a linear layer, it is a {type(module).__name__}.")
    return module


def embedding(root: nn.Module, name: str) -> nn.Embedding:
    module = root.get_submodule(name)
    if not isinstance(module, nn.Embedding):
        raise TypeError(f"The family's table calls {name} an embedding, it is a {type(module).__name__}.")
    return module
