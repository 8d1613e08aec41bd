"""A written model of which one part at a time has weights: the student of a block-by-block distillation.

Whatever the checkpoint is (stock, sliced, factorised, packed with its adapter, compact), its own class is built without
weights. Its embeddings or one of its blocks are filled from the files, each tensor as it is stored, used and emptied.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from compress import families
from compress.models.decoder import Arguments, Recorder, embedded
from compress.models.loading import load_config
from compress.models.modeling_compact import CompactForCausalLM
from compress.models.modeling_lowrank import LowRankForCausalLM
from compress.models.modeling_sliced import finished_logits
from compress.models.stored_files import StoredTensors, read_lora, read_scheme
from compress.models.stored_loading import FLOATS, hollow_model, is_stored, put_linears


class Student:
    """The parts of a checkpoint of ours.

    dtype: what is computed in; codes and indices stay what they are. tensors: the files', by their names in the model.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self.tensors = StoredTensors(folder, read_lora(folder))
        self.model = self._hollow(folder)
        self.stock, self.prefix = innermost(self.model)
        self.family = families.find(text_config(self.model.config))
        self.blocks: list[nn.Module] = list(self.stock.get_submodule(self.family.blocks))
        self.recorders = [Recorder(returns_tuple=self.family.returns_tuple) for _ in self.blocks]

    def _hollow(self, folder: Path) -> PreTrainedModel:
        if is_stored(folder):
            model = hollow_model(folder, self.dtype)
            put_linears(model, read_scheme(folder), self.tensors, self.dtype)
        else:
            with no_init_weights(), init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(load_config(folder), dtype=self.dtype)
        stored = model.state_dict().keys()
        for name, buffer in list(model.named_buffers()):
            put(model, name, buffer.to("meta" if name in stored else self.device))
        return model.eval()

    def block_prefix(self, index: int) -> str:
        return f"{self.prefix}{self.family.blocks}.{index}."

    @contextmanager
    def embeddings(self) -> Iterator[None]:
        """The embeddings filled for as long as the context is open."""
        tables = [f"{self.prefix}{table}" for table in self.family.embedding_parts]
        self._fill(self.model, [f"{table}.weight" for table in tables])
        yield
        for table in tables:
            empty(self.model.get_submodule(table))

    @contextmanager
    def block(self, index: int) -> Iterator[dict[str, Tensor]]:
        """A block filled for as long as the context is open; its tensors as stored, by their names below it."""
        prefix, block = self.block_prefix(index), self.blocks[index]
        stored = self._fill(self.model, [f"{prefix}{name}" for name in block.state_dict()])
        yield {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
        empty(block)

    @contextmanager
    def head(self) -> Iterator[None]:
        """The final norm and the head filled for as long as the context is open; tied, it is the embeddings' table."""
        parts = [f"{self.prefix}{name}" for name in self.family.head_parts]
        names = {
            f"{part}.{name}": f"{part}.{name}" for part in parts for name in self.model.get_submodule(part).state_dict()
        }
        if self.tensors.find(f"{parts[-1]}.weight") is None:
            names[f"{parts[-1]}.weight"] = f"{self.prefix}{self.family.embeddings[0]}.weight"
        stored = self._read(names.values())
        self.fill(self.model, {name: stored[stored_as] for name, stored_as in names.items()})
        yield
        for part in parts:
            empty(self.model.get_submodule(part))

    def logits(self, stream: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch vocabulary"]:
        """The head must be filled."""
        for part in self.family.head_parts:
            stream = self.stock.get_submodule(part)(stream)
        return finished_logits(stream, self.family.logits, text_config(self.model.config))

    def embed(self, ids: Int64[Tensor, "batch tokens"]) -> tuple[Float[Tensor, "batch tokens d"], list[Arguments]]:
        """The stream before the first block, and what each block is called with besides it."""
        return embedded(self.stock, self.family, self.recorders, ids.to(self.device))

    def fill(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Give a module tensors by their names below it: floats in the computing dtype, codes as they are."""
        for name, tensor in tensors.items():
            is_float = tensor.dtype in FLOATS
            put(module, name, tensor.to(self.device, self.dtype) if is_float else tensor.to(self.device))

    def _fill(self, module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
        stored = self._read(names)
        self.fill(module, stored)
        return stored

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return dict(self.tensors.read({name: str(self.tensors.find(name)) for name in names}))


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace the parameter or buffer of this name."""
    owner, _, attribute = name.rpartition(".")
    place = module.get_submodule(owner)
    is_parameter = attribute in dict(place.named_parameters(recurse=False))
    setattr(place, attribute, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def empty(module: nn.Module) -> None:
    """Let go of a part's weights."""
    for name, tensor in module.state_dict().items():
        put(module, name, tensor.to("meta"))


def innermost(model: PreTrainedModel) -> tuple[Any, str]:
    """The model that architectures of ours are built around, and what its names begin with in theirs."""
    prefix = ""
    while isinstance(model, CompactForCausalLM | LowRankForCausalLM):
        model, prefix = model.model, f"{prefix}model."
    return model, prefix


def text_config(config: Any) -> Any:
    """The stock config at the bottom of a written one."""
    while hasattr(config, "text_config"):
        config = config.text_config
    return config
