"""Weights read lazily from safetensors, sharded or not.

Nothing but safetensors is opened, and an index can only name files of its own folder. A file is open only while it is
read: a mapped file counts as memory for as long as it stays open, and would make memory grow with depth. Each time it
has to be the one whose header was read first.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from compress.errors import CheckpointError, NumericalError, UnsupportedModel
from compress.models.expert_names import Piece, fused_piece, stored_forms
from compress.models.tensor_files import checkpoint_files, open_safetensors

# GPT-NeoX's head is stored by the name it had before transformers 5, which still saves it so.
OTHER_NAMES = {"lm_head.weight": "embed_out.weight"}
FUSED_DIMENSIONS = 3
READABLE = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


class LazyWeights:
    """The tensors of a checkpoint folder by name. Opening it reads headers only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        self.versions: dict[Path, tuple[int, ...]] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.dtypes: dict[str, str] = {}
        for file in checkpoint_files(folder):
            self._read_header(file)

    def resolve(self, name: str) -> str | None:
        """The name of the stored tensor that has a parameter, alone or among other experts'.

        Some checkpoints were saved from below `model.` or by an older name.
        """
        piece = fused_piece(name)
        names = [*stored_forms(name), *([piece.stored] if piece else [])]
        forms = [form for each in names for form in (each, each.removeprefix("model."), OTHER_NAMES.get(each, each))]
        return next((form for form in forms if form in self.files), None)

    def piece(self, name: str) -> Piece | None:
        """Where in its stored tensor a parameter is; None where it is all of it."""
        piece = fused_piece(name)
        is_fused = piece is not None and str(self.resolve(name)).endswith(piece.stored.removeprefix("model."))
        return piece if is_fused else None

    def shape(self, name: str) -> torch.Size:
        """Of a parameter that is stored."""
        stored, piece = self.shapes[str(self.resolve(name))], self.piece(name)
        if piece is None or len(stored) != FUSED_DIMENSIONS:
            return stored
        rows = piece.rows(stored[1])
        return torch.Size([len(range(stored[1])[rows]), stored[2]])

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors as stored, on the CPU, each checked for NaN and Inf, under the names asked for."""
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            stored = self.resolve(name)
            if stored is None:
                raise CheckpointError(f"The checkpoint {self.folder} has no tensor {name!r}.")
            by_file[self.files[stored]].append(name)
        tensors: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            with self._opened(file) as opened:
                for name in wanted:
                    # A copy: what safetensors returns is a view of the mapped file.
                    tensors[name] = finite(self._get(opened, name).clone(), name)
        return tensors

    def _get(self, opened: Any, name: str) -> Tensor:
        stored, piece = str(self.resolve(name)), self.piece(name)
        if piece is None:
            return opened.get_tensor(stored)
        return opened.get_slice(stored)[piece.expert, piece.rows(self.shapes[stored][1])]

    def _has_expert(self, name: str) -> bool:
        piece = self.piece(name)
        return piece is None or piece.expert < self.shapes[str(self.resolve(name))][0]

    @contextmanager
    def _opened(self, file: Path) -> Iterator[Any]:
        """Raises CheckpointError for a file that is gone, cannot be read or is not the one it was."""
        try:
            with open_safetensors(file) as opened:
                yield opened
            if version_of(file) != self.versions[file]:
                raise CheckpointError(f"{file} has changed during the run. Start over with --overwrite.")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{file} cannot be read ({error}). Get it again, then go on with --resume."
            ) from error

    def samples(self) -> Iterator[tuple[str, bytes]]:
        """A row from the midst of every tensor, by name: enough to tell two models of one shape apart."""
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name in sorted(self.files):
            by_file[self.files[name]].append(name)
        for file in sorted(by_file):
            with self._opened(file) as opened:
                for name in by_file[file]:
                    middle = self.shapes[name][0] // 2 if self.shapes[name] else 0
                    row = opened.get_slice(name)[middle : middle + 1] if self.shapes[name] else opened.get_tensor(name)
                    yield name, row.contiguous().view(torch.uint8).numpy().tobytes()

    def _read_header(self, file: Path) -> None:
        if file.is_file():
            self.versions[file] = version_of(file)
        with open_safetensors(file) as opened:
            for name in opened.keys():  # noqa: SIM118 (no dict)
                view = opened.get_slice(name)
                if name in self.files:
                    raise CheckpointError(f"The tensor {name!r} is in both {self.files[name].name} and {file.name}.")
                self.files[name] = file
                self.shapes[name] = torch.Size(view.get_shape())
                self.dtypes[name] = view.get_dtype()

    def check_against(self, shapes: dict[str, torch.Size], *, may_miss: Iterable[str] = ()) -> None:
        """That every parameter of the model is stored, in its shape and in a float type. Reads no weights."""
        missing, optional = [], set(may_miss)
        for name, shape in shapes.items():
            stored = self.resolve(name)
            if stored is None:
                missing += [name] if name not in optional else []
            elif self.shape(name) != shape or not self._has_expert(name):
                found = list(self.shapes[stored])
                raise CheckpointError(f"The tensor {name!r} has shape {found}, but config.json says {list(shape)}.")
            elif self.dtypes[stored] not in READABLE:
                raise UnsupportedModel(
                    f"The tensor {name!r} is stored as {self.dtypes[stored]}: a quantised checkpoint. "
                    "Start from the unquantised model (F16, BF16, F32 or F64)."
                )
        if missing:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise CheckpointError(f"The checkpoint {self.folder} lacks {len(missing)} tensors of its model: {shown}.")


def version_of(file: Path) -> tuple[int, ...]:
    """What is another one when the file is written anew or replaced."""
    stat = file.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def finite(tensor: Tensor, name: str) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise NumericalError(f"The weight {name!r} has a NaN or Inf. The input checkpoint is broken: get it again.")
    return tensor
