"""A tuned checkpoint's files: those of the untuned one, byte for byte, but for the numbers that were tuned.

A finished block is a file `tuned-*.safetensors`, there whole or not at all; a run that goes on takes it for done. When
all blocks are, the checkpoint's files are copied, the tuned tensors are written over the old ones in their places, the
copies get their names and the blocks' files go.
"""

import json
import os
import shutil
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from compress.errors import OutputError
from compress.models.stored_files import StoredTensors
from compress.streaming.journal import new_file_mode, write_tensors

REPORT = "report"  # beside the tensors in a block's file


def block_file(out: Path, index: int) -> Path:
    return out / f"tuned-{index:05d}.safetensors"


def keep_block(out: Path, index: int, tensors: dict[str, Tensor], report: Tensor) -> None:
    """tensors: by their names in the model, as they will be stored."""
    write_tensors(block_file(out, index), {name: t.contiguous() for name, t in tensors.items()} | {REPORT: report})


def kept_block(out: Path, index: int) -> tuple[dict[str, Tensor], Tensor]:
    tensors: dict[str, Tensor] = load_file(block_file(out, index))
    # Copies: tensors of a file lie unaligned, and products of matrices round differently there.
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return tensors, tensors.pop(REPORT)


def write_files(folder: Path, out: Path, tensors: StoredTensors, num_blocks: int) -> None:
    """The checkpoint `folder` with the tensors of the blocks' files, in the folder `out`. Raises OutputError."""
    targets = {file: out / file.relative_to(folder) for file, _ in tensors.places.values()}
    copies = {file: target.with_suffix(".unfinished") for file, target in targets.items()}
    try:
        for file, copy in copies.items():
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
            copy.chmod(new_file_mode())
        for index in range(num_blocks):
            for name, tensor in kept_block(out, index)[0].items():
                file, key = tensors.places[str(tensors.resolve(name))]
                overwrite(copies[file], key, tensor)
        for file, copy in copies.items():
            with copy.open("rb") as opened:
                os.fsync(opened.fileno())
            copy.replace(targets[file])
    except OSError as error:
        for copy in copies.values():
            copy.unlink(missing_ok=True)
        raise OutputError(
            f"{out} cannot be written ({error}). Free space or choose another --out; --resume goes on from here."
        ) from error
    for index in reversed(range(num_blocks)):
        block_file(out, index).unlink()


def overwrite(file: Path, key: str, tensor: Tensor) -> None:
    """Put a tensor of the same dtype and shape in the place of the one in a safetensors file."""
    with file.open("r+b") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        begin, end = json.loads(opened.read(length))[key]["data_offsets"]
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        if len(data) != end - begin:
            raise ValueError(f"{key} has {len(data)} bytes, its place in {file} {end - begin}.")
        opened.seek(8 + length + begin)
        opened.write(data)
