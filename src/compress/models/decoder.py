"""A causal LM of which one part at a time is loaded.

The stock model is built on the meta device, where it costs nothing, and its parts (the embeddings, one decoder block,
the head) are filled, used and emptied in turn. Stock code does all the computing: nothing of it is copied here.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from compress.families import BranchTable, Family, Units
from compress.models.branch import Branch, Writer
from compress.models.loading import hollow_model
from compress.models.soundness import check_sound, first_unsound
from compress.own_model.modeling_compress import (
    SparseMLP,
    as_residual_block,
    finished_logits,
    replace,
    shortcut_name,
    structure_of,
    unfuse_experts,
)

Arguments = dict[str, Any]
M = TypeVar("M", bound=nn.Module)


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
        self.dense_width = int(config.hidden_size)
        self.model = unfuse_experts(hollow_model(self.config, dtype)).eval()
        self.blocks = list(self.model.get_submodule(family.blocks))
        for index, block in enumerate(self.blocks):
            # No stock loop runs them here; whoever does wants the stream alone.
            as_residual_block(block, {**structure_of(self.structure, index), "returns_tuple": False}, config)
        self.recorders = [Recorder(returns_tuple=family.returns_tuple) for _ in self.blocks]
        for owner in self.model.modules():
            for name, buffer in owner.named_buffers(recurse=False):
                setattr(owner, name, buffer.to(device))

    def parameter_shapes(self) -> dict[str, torch.Size]:
        """Shapes of the dense model's parameters; a tied head is listed under its own name."""
        shapes = {name: p.shape for name, p in self.model.named_parameters(remove_duplicate=False)}
        return dict(sorted(shapes.items()))

    def embedding_names(self) -> list[str]:
        return [f"{part}.weight" for part in self.family.embedding_parts]

    def block_names(self, index: int) -> list[str]:
        return [f"{self.block_prefix(index)}{name}" for name, _ in self.blocks[index].named_parameters()]

    def head_names(self) -> list[str]:
        parts = self.family.head_parts
        return [f"{part}.{name}" for part in parts for name, _ in self.model.get_submodule(part).named_parameters()]

    def block_prefix(self, index: int) -> str:
        return f"{self.family.blocks}.{index}."

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Load weights by their names, in the compute dtype and on the device."""
        for name, tensor in tensors.items():
            replace(self.model, name, nn.Parameter(tensor.to(self.device, self.dtype), requires_grad=False))

    def embedding_branch(self) -> Branch:
        return self._branch("embeddings", self.model, (), self.family.embeddings, kind=nn.Embedding)

    def head_branch(self) -> Branch:
        reader = self.family.last_reader
        return self._branch("head", self.model, (reader,), (), norms={self.family.final_norm: (reader,)})

    def block_branches(self, index: int) -> list[Branch]:
        return [self._block_branch(index, table) for table in self.family.branches_of(index)]

    def embed(self, ids: Int64[Tensor, "batch tokens"]) -> tuple[Float[Tensor, "batch tokens d"], list[Arguments]]:
        """Compute the stream before the first block and the other arguments of each block."""
        # Recorders in the places of the blocks, and nothing in those of the modules after them.
        after = [part for part in self.family.head_parts if part != self.family.head]
        stand_ins = {self.family.blocks: nn.ModuleList(self.recorders), **{part: nn.Identity() for part in after}}
        kept = {name: self.model.get_submodule(name) for name in stand_ins}
        for name, module in stand_ins.items():
            replace(self.model, name, module)
        try:
            self.model.get_submodule(self.family.body)(input_ids=ids.to(self.device), use_cache=False)
        finally:
            for name, module in kept.items():
                replace(self.model, name, module)
        hidden_states = self.recorders[0].hidden_states
        if hidden_states is None:
            raise RuntimeError("The stock model did not call its first block.")
        check_sound(hidden_states, "the embeddings")
        return hidden_states, [recorder.arguments for recorder in self.recorders]

    def run_block(
        self, index: int, hidden_states: Float[Tensor, "batch tokens d"], arguments: Sequence[Arguments]
    ) -> Float[Tensor, "batch tokens d"]:
        """Run a block. arguments: of all blocks, as `embed` gives them."""
        found: Tensor = self.blocks[index](hidden_states, **arguments[index])
        check_sound(found, f"the stream after block {index}")
        return found

    def logits(self, hidden_states: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens vocabulary"]:
        final_norm = self.family.final_norm
        normed = self.model.get_submodule(final_norm)(hidden_states) if final_norm else hidden_states
        found = self.logits_of(self.model.get_submodule(self.family.last_reader)(normed))
        check_sound(found, "the logits")
        return found

    def logits_of(self, read: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens vocabulary"]:
        """Compute the logits. read: the output of the last reader of the stream."""
        outputs = self.model.get_submodule(self.family.head)(read) if self.family.project_out else read
        return finished_logits(outputs, self.family.logits, self.config)

    def empty(self, module: nn.Module) -> None:
        for owner in module.modules():
            for name, parameter in list(owner.named_parameters(recurse=False)):
                setattr(owner, name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def _block_branch(self, index: int, table: BranchTable) -> Branch:
        block = self.blocks[index]
        names = next(branch for branch in block.structure["branches"] if branch["name"] == table.name)
        name = f"block {index} {table.name}"
        steps = (block.get_submodule(step) for path in table.paths for step in path)
        return self._branch(
            name,
            block,
            table.readers,
            table.writers,
            norms=table.readers_by_norm(),
            shortcut_name=shortcut_name(names),
            scale=self.family.scale(self.config),
            post_norm=table.post_norm,
            post_norm_of=table.post_norm_of,
            units=self._units(table),
            experts=tuple(
                self._branch(f"block {index} {each.name}", block, each.readers, each.writers, units=self._units(each))
                for each in table.experts
            ),
            sparse=next((step for step in steps if isinstance(step, SparseMLP)), None),
            run=partial(run_branch, block, names, name),
        )

    def _branch(
        self,
        name: str,
        owner: nn.Module,
        readers: Sequence[str],
        writers: Sequence[str],
        *,
        kind: type[Writer] = nn.Linear,
        **facts: Any,
    ) -> Branch:
        return Branch(
            name=name,
            owner=owner,
            readers={reader: part_of(owner, reader, nn.Linear) for reader in readers},
            writers={writer: part_of(owner, writer, kind) for writer in writers},
            norm_kind=self.family.norm,
            norm_eps=self.family.epsilon(self.config),
            dense_width=self.dense_width,
            **facts,
        )

    def _units(self, table: BranchTable) -> dict[str, tuple[Units, int]]:
        return {units.kind: (units, units.number(self.config)) for units in table.units}


def run_branch(
    block: Any, structure: Mapping[str, Any], name: str, hidden_states: Tensor, arguments: Arguments
) -> Tensor:
    """Run a branch; return what it adds to the stream. structure: the names of the block's parts."""
    found: Tensor = block.run_branch(structure, hidden_states, **arguments)
    where = partial(first_unsound, block, partial(block.run_branch, structure, hidden_states, **arguments))
    check_sound(found, f"the stream after {name}", where)
    return found


def part_of(root: nn.Module, name: str, kind: type[M]) -> M:
    module = root.get_submodule(name)
    if not isinstance(module, kind):
        raise TypeError(f"The family's table calls {name} a {kind.__name__}, it is a {type(module).__name__}.")
    return module
