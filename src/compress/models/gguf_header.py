"""Read the header of a GGUF file: its fields, and where its tensors lie. Only the header is looked at.

Format: ggml, docs/gguf.md. The package gguf knows the types of tensors; its own reader takes seconds and 150 MB for the
header of a small model, and the word of a damaged file for how much there is to read.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import CheckpointError, UnsupportedModel
from compress.models.untrusted import reading

VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
FLOAT32, STRING, ARRAY = 6, 8, 9
MOST_DIMENSIONS = 4
ALIGNMENT = 32  # where the field general.alignment does not say
SPLIT = "split.count"
LARGEST_HEADER = 2**26  # bytes; a vocabulary of a quarter million tokens with its merges takes a fifth


@dataclass(frozen=True)
class GgufTensor:
    """
    shape: as torch has it. kind: gguf's name of its type. start: its first byte. row_bytes: of its last dimension.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    row_bytes: int

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        return self.numbers // self.shape[-1]


@dataclass(frozen=True)
class Header:
    file: Path
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def read_rows(self, tensor: GgufTensor, first: int, last: int) -> np.ndarray:
        """Read rows as bytes. Raises OSError where the file has become shorter."""
        with self.file.open("rb") as opened:
            opened.seek(tensor.start + first * tensor.row_bytes)
            data = opened.read((last - first) * tensor.row_bytes)
        if len(data) < (last - first) * tensor.row_bytes:
            raise OSError("it has become shorter")
        return np.frombuffer(data, np.uint8).reshape(last - first, tensor.row_bytes)


class Cursor:
    """What a GGUF header is made of, one after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place = data, 0

    def advance(self, length: int) -> int:
        """Go on by so many bytes; return where they begin. Raises ValueError at the end of the data."""
        begin, self.place = self.place, self.place + length
        if self.place > min(len(self.data), LARGEST_HEADER):
            raise ValueError(f"its header claims {self.place:,} bytes or more")
        return begin

    def take(self, code: str) -> tuple[Any, ...]:
        return struct.unpack_from(f"<{code}", self.data, self.advance(struct.calcsize(f"<{code}")))

    def string(self) -> bytes:
        (length,) = self.take("Q")
        begin = self.advance(length)
        return self.data[begin : self.place]

    def text(self) -> str:
        return self.string().decode(errors="replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array()
        if kind not in SCALARS:
            raise ValueError(f"it has a value of the unknown type {kind}")
        (found,) = self.take(SCALARS[kind])
        return shortest(found) if kind == FLOAT32 else found

    def array(self) -> str:
        """Go over an array, such as a vocabulary: what is needed of the header here are single values."""
        kind, count = self.take("IQ")
        if kind in SCALARS:
            self.advance(count * struct.calcsize(f"<{SCALARS[kind]}"))
        for _ in range(0 if kind in SCALARS else count):
            self.string() if kind == STRING else self.value(kind)
        return f"an array of {count:,}"


def shortest(number: float) -> float:
    """The number with the fewest digits that is this one in float32: 1e-05, as the config had it before."""
    return float(str(np.float32(number)))


def read_header(file: Path) -> Header:
    """Raises CheckpointError for a damaged file, UnsupportedModel for one of several or types that are not known."""
    with reading(f"{file} is no GGUF file or damaged", "Get it again."), file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return parsed(file, Cursor(data))


def parsed(file: Path, cursor: Cursor) -> Header:
    _, version, tensor_count, field_count = cursor.take("4sIQQ")
    if version not in VERSIONS:
        raise ValueError(f"its version is {version}, and not 2 or 3")
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        name, (kind,) = cursor.text(), cursor.take("I")
        if name in fields:
            raise ValueError(f"it has the field {name!r} twice")
        fields[name] = cursor.value(kind)
    if fields.get(SPLIT, 1) > 1:
        raise UnsupportedModel(f"{file} is one of {fields[SPLIT]} parts. Join them: llama-gguf-split --merge.")
    entries = [tensor_entry(cursor) for _ in range(tensor_count)]
    alignment = fields.get("general.alignment", ALIGNMENT)
    begin = -(-cursor.place // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, dimensions, kind, offset in entries:
        if name in tensors:
            raise ValueError(f"it has the tensor {name!r} twice")
        tensors[name] = tensor = placed(file, name, dimensions, kind, begin + offset)
        end = tensor.start + tensor.rows * tensor.row_bytes
        if end > len(cursor.data):
            raise CheckpointError(
                f"{file} is cut short: {name!r} ends at byte {end:,} of {len(cursor.data):,}. Get it again."
            )
    return Header(file, fields, tensors)


def tensor_entry(cursor: Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, (count,) = cursor.text(), cursor.take("I")
    if not 1 <= count <= MOST_DIMENSIONS:
        raise ValueError(f"{name!r} has {count} dimensions")
    dimensions, (kind, offset) = cursor.take(f"{count}Q"), cursor.take("IQ")
    return name, dimensions, kind, offset


def placed(file: Path, name: str, dimensions: tuple[int, ...], kind: int, start: int) -> GgufTensor:
    """dimensions: the fastest first, as ggml has them."""
    import gguf

    if not all(dimensions):
        raise ValueError(f"{name!r} has no numbers, its dimensions are {list(dimensions)}")
    try:
        known = gguf.GGMLQuantizationType(kind)
    except ValueError as error:
        raise UnsupportedModel(
            f"{file} has {name!r} in the type {kind}, which the package gguf does not know."
        ) from error
    numbers, size = gguf.GGML_QUANT_SIZES[known]
    if dimensions[0] % numbers:
        raise ValueError(f"the rows of {name!r} have {dimensions[0]} numbers, no multiple of {known.name}'s {numbers}")
    return GgufTensor(name, dimensions[::-1], known.name, start, dimensions[0] // numbers * size)
