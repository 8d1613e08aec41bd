"""The finished blocks of a tuning, a file each, there whole or not at all; a run that goes on takes them for done."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from compress.models.tensor_files import open_safetensors
from compress.streaming.journal import write_tensors

FILES = "finding-block-*.safetensors"
REPORT = "report"  # beside the tensors in a block's file


def block_file(out: Path, index: int) -> Path:
    return out / FILES.replace("*", f"{index:05d}")


def keep_block(out: Path, index: int, tensors: dict[str, Tensor], report: Tensor) -> None:
    """tensors: by their names in the model, as they will be stored."""
    write_tensors(block_file(out, index), {name: t.contiguous() for name, t in tensors.items()} | {REPORT: report})


def kept_block(out: Path, index: int) -> tuple[dict[str, Tensor], Tensor]:
    tensors: dict[str, Tensor] = load_file(block_file(out, index))
    # Copies: tensors of a file lie unaligned, and products of matrices round differently there.
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return tensors, tensors.pop(REPORT)


class KeptTensors(Mapping[str, Tensor]):
    """The tensors of all finished blocks by their names in the model, each read when it is asked for."""

    def __init__(self, out: Path) -> None:
        self.files: dict[str, Path] = {}
        for file in sorted(out.glob(FILES)):
            with open_safetensors(file) as opened:
                self.files |= {name: file for name in opened.keys() if name != REPORT}  # noqa: SIM118 (no dict)

    def __getitem__(self, name: str) -> Tensor:
        with open_safetensors(self.files[name]) as opened:
            tensor: Tensor = opened.get_tensor(name).clone()
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)
