"""What the headers of safetensors files say: which tensors there are, of which type and shape. Reads no weights."""

import math
from dataclasses import dataclass
from pathlib import Path

from compress.errors import CheckpointError
from compress.models.tensor_files import open_safetensors

BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True)
class StoredTensor:
    """
    name: in the file. dtype: as safetensors call it.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numbers * BITS[self.dtype] // 8


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of a file. That the header fits the file, safetensors itself checks. Raises CheckpointError."""
    found = []
    with open_safetensors(file) as opened:
        for name in opened.keys():  # noqa: SIM118 (no dict)
            view = opened.get_slice(name)
            dtype = str(view.get_dtype())
            if dtype not in BITS:
                raise CheckpointError(f"{file} has {name!r} in a type that is not known here ({dtype}).")
            found.append(StoredTensor(file, name, dtype, tuple(view.get_shape())))
    return found
