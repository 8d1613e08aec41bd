"""From a checkpoint's weights to a decoder's parts, and from finished branches to the form that is written.

Names are those of a model whose experts are single linears.
"""

import copy
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from compress.errors import CheckpointError, UnsupportedModel
from compress.models.branch import Branch
from compress.models.decoder import Decoder
from compress.models.factors import WrittenForm
from compress.models.tensor_files import Piece, SafetensorsFolder, file_name, fused_piece, stored_forms
from compress.models.untrusted import shown

FUSED_DIMENSIONS = 3
ADAPTER_PREFIX = "base_model.model."  # what PEFT calls the model that an adapter is for
BLOCK_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # the first is a block's
LORA = (".lora_A", ".lora_B")
READABLE = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def renumbered(name: str, numbers: Mapping[int, int]) -> str:
    """The name of a tensor or a module where blocks have other numbers; those outside of blocks keep theirs."""
    return BLOCK_NUMBER.sub(lambda found: str(numbers[int(found[0])]), name, count=1)


def block_number(name: str) -> int | None:
    """The number of the block that a tensor or a module is in; None outside of blocks."""
    found = BLOCK_NUMBER.search(name)
    return None if found is None else int(found[0])


class LazyWeights:
    """Weights of a checkpoint folder by their names in the model. Opening reads headers only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stored = SafetensorsFolder(folder)
        self.dense_name: Callable[[str], str] = str  # of a parameter where blocks are left out

    def of_blocks(self, kept: Sequence[int]) -> "LazyWeights":
        """The weights of the model that has only these of the blocks, by their names in that one."""
        found = copy.copy(self)
        found.dense_name = partial(renumbered, numbers=dict(enumerate(kept)))
        return found

    def locate(self, name: str) -> tuple[str | None, Piece | None]:
        """Name of the stored tensor that holds a parameter, and where in it: among other experts', or all of it."""
        name = self.dense_name(name)
        piece = fused_piece(name)
        stored = self.stored.find(*stored_forms(name), *([piece.stored] if piece else []))
        is_fused = piece is not None and str(stored).endswith(piece.stored.removeprefix("model."))
        return stored, piece if is_fused else None

    def resolve(self, name: str) -> str | None:
        return self.locate(name)[0]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors as they are stored, on the CPU.

        Raises NumericalError for a NaN or Inf, CheckpointError for what is not there or has changed.
        """
        wanted, parts = {}, {}
        for name in names:
            stored, piece = self.locate(name)
            if stored is None:
                raise CheckpointError(f"The checkpoint {self.folder} has no tensor {name!r}.")
            wanted[name] = stored
            if piece is not None:
                parts[name] = piece.expert, piece.rows(self.stored.tensors[stored].shape[1])
        found = dict(self.stored.read(wanted, parts))
        return {name: found[name] for name in wanted}

    def samples(self) -> Iterator[tuple[str, bytes]]:
        """Yield a row from the middle of every tensor: enough to tell two models of one shape apart."""
        tensors = self.stored.tensors
        order = sorted(tensors, key=lambda name: (tensors[name].file, name))
        for file, names in itertools.groupby(order, key=lambda name: tensors[name].file):
            with self.stored.opened(file) as opened:
                for name in names:
                    middle = tensors[name].shape[0] // 2 if tensors[name].shape else 0
                    view = opened.get_slice(name)
                    row = view[middle : middle + 1] if tensors[name].shape else opened.get_tensor(name)
                    yield name, row.contiguous().view(torch.uint8).numpy().tobytes()

    def check_against(self, shapes: dict[str, torch.Size], *, may_miss: Iterable[str] = ()) -> None:
        """Check that every parameter of the model is stored, in its shape and in a float type. Reads no weights."""
        missing, optional = [], set(may_miss)
        for name, shape in shapes.items():
            stored, piece = self.locate(name)
            if stored is None:
                missing += [name] if name not in optional else []
                continue
            tensor = self.stored.tensors[stored]
            found = tensor.shape
            if piece is not None and piece.expert >= found[0]:
                found = ()
            elif piece is not None and len(found) == FUSED_DIMENSIONS:
                found = len(range(found[1])[piece.rows(found[1])]), found[2]
            if found != shape:
                raise CheckpointError(
                    f"The tensor {name!r} has shape {list(tensor.shape)}, but config.json says {list(shape)}."
                )
            if tensor.dtype not in READABLE:
                raise UnsupportedModel(
                    f"The tensor {name!r} is stored as {tensor.dtype}: a quantized checkpoint. "
                    "Start from the unquantized model (F16, BF16, F32 or F64)."
                )
        if missing:
            what = f"{len(missing)} tensors of its model: {shown(missing)}"
            raise CheckpointError(f"The checkpoint {self.folder} lacks {what}.")


@dataclass(frozen=True)
class PartLoader:
    """Load weights for the duration of a `with loader.block(3): ...`."""

    decoder: Decoder
    weights: LazyWeights

    def embeddings(self) -> AbstractContextManager[None]:
        return self._loaded(self.decoder.family.embedding_parts, self.decoder.embedding_names())

    def head(self) -> AbstractContextManager[None]:
        return self._loaded(self.decoder.family.head_parts, self.decoder.head_names())

    @contextmanager
    def block(self, index: int) -> Iterator[None]:
        decoder = self.decoder
        for name in decoder.block_names(index):  # one at a time: they are held as stored and as computed with
            decoder.fill(self.weights.read([name]))
        yield
        decoder.empty(decoder.blocks[index])

    @contextmanager
    def _loaded(self, parts: Iterable[str], names: list[str]) -> Iterator[None]:
        head, table = f"{self.decoder.family.head}.weight", self.decoder.embedding_names()[0]
        if head in names and self.weights.resolve(head) is None:  # tied: the first table under its own name
            tensors = self.weights.read([table, *(name for name in names if name != head)])
            tensors[head] = tensors.pop(table)
        else:
            tensors = self.weights.read(names)
        self.decoder.fill(tensors)
        del tensors
        yield
        for part in parts:
            self.decoder.empty(self.decoder.model.get_submodule(part))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Write branches as the walk leaves them: the form of the dense model and of our own architecture.

    model_type: of the stock model that is written, whose files have other names for experts' linears; "" for ours.
    ties_head: whether the head stays the embeddings' table.
    """

    model_type: str = ""
    ties_head: bool = False

    def directions(self, width: int) -> int:
        """How many directions of the stream a hidden size of `width` has room for."""
        return width

    def form(self, branch: Branch, name: str) -> WrittenForm:
        """The form that a reader or writer gets when its branch is finished."""
        return WrittenForm()

    def settle(self, branch: Branch) -> None:
        """Bring a finished branch into the written form, in place."""

    def file_name(self, name: str) -> str:
        """The name in the checkpoint's files of a tensor of the model."""
        return file_name(name, self.model_type) if self.model_type else name

    def in_adapter(self, name: str) -> str | None:
        """The name in the checkpoint's LoRA adapter; None for a tensor of the checkpoint itself."""
        return f"{ADAPTER_PREFIX}{name}.weight" if name.endswith(LORA) else None
