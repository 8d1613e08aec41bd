"""Read the dense weights of a checkpoint lazily, by the names of a model whose experts are single linears."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from compress.errors import CheckpointError, UnsupportedModel
from compress.models.tensor_files import Piece, SafetensorsFolder, fused_piece, stored_forms

FUSED_DIMENSIONS = 3
READABLE = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


class LazyWeights:
    """Weights of a checkpoint folder by their names in the model. Opening reads headers only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stored = SafetensorsFolder(folder)

    def resolve(self, name: str) -> str | None:
        """Name of the stored tensor that holds a parameter, alone or among other experts'."""
        piece = fused_piece(name)
        return self.stored.find(*stored_forms(name), *([piece.stored] if piece else []))

    def piece(self, name: str) -> Piece | None:
        """Where a parameter is in its stored tensor; None where it is all of it."""
        piece = fused_piece(name)
        is_fused = piece is not None and str(self.resolve(name)).endswith(piece.stored.removeprefix("model."))
        return piece if is_fused else None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored parameter."""
        shape, piece = self.stored.tensors[str(self.resolve(name))].shape, self.piece(name)
        if piece is None or len(shape) != FUSED_DIMENSIONS:
            return shape
        return len(range(shape[1])[piece.rows(shape[1])]), shape[2]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors as they are stored, on the CPU.

        Raises NumericalError for a NaN or Inf, CheckpointError for what is not there or has changed.
        """
        wanted, parts = {}, {}
        for name in names:
            stored, piece = self.resolve(name), self.piece(name)
            if stored is None:
                raise CheckpointError(f"The checkpoint {self.folder} has no tensor {name!r}.")
            wanted[name] = stored
            if piece is not None:
                parts[name] = piece.expert, piece.rows(self.stored.tensors[stored].shape[1])
        found = dict(self.stored.read(wanted, parts))
        return {name: found[name] for name in wanted}

    def _has_expert(self, name: str) -> bool:
        piece = self.piece(name)
        return piece is None or piece.expert < self.stored.tensors[str(self.resolve(name))].shape[0]

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
            stored = self.resolve(name)
            if stored is None:
                missing += [name] if name not in optional else []
                continue
            tensor = self.stored.tensors[stored]
            if self.shape(name) != shape or not self._has_expert(name):
                raise CheckpointError(
                    f"The tensor {name!r} has shape {list(tensor.shape)}, but config.json says {list(shape)}."
                )
            if tensor.dtype not in READABLE:
                raise UnsupportedModel(
                    f"The tensor {name!r} is stored as {tensor.dtype}: a quantized checkpoint. "
                    "Start from the unquantized model (F16, BF16, F32 or F64)."
                )
        if missing:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise CheckpointError(f"The checkpoint {self.folder} lacks {len(missing)} tensors of its model: {shown}.")
