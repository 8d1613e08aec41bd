"""Read the safetensors files of a checkpoint folder: their list, headers and tensors. In the folder that stands for a
GGUF file (`models/gguf_weights.py`) it is read in the same way.

Nothing else is opened, and an index can only name files of its own folder. Safetensors' headers are read without torch.
A file is open only while it is read: a mapped file counts as memory for as long as it stays open, and would make memory
grow with depth. Each time it has to be the one whose header was read first.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from compress.errors import CheckpointError, NumericalError
from compress.io import GGUF, version_of
from compress.models.untrusted import parse_json

ADAPTER = "adapter"  # the folder of a LoRA beside a model
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LARGEST_HEADER = 2**25  # bytes; a hundred thousand tensors take half of it
LONGEST_NAME = 255  # bytes that file systems allow
MAPPED = 2**25  # bytes of a file that are mapped at a time
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# GPT-NeoX's head is stored by the name it had before transformers 5, which still saves it so.
OTHER_NAMES = {"lm_head.weight": "embed_out.weight"}
WITHIN = "model.language_model."  # what transformers saves Qwen3.5's language model under, where it was part of a whole
FLOATS = ("F64", "F32", "F16", "BF16")  # what weights that are not quantized are stored in
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
    """A tensor's header entry. name: in the file. dtype: as safetensors call it."""

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


class SafetensorsFolder:
    """The tensors of a checkpoint folder by name. Opening it reads headers only.

    Raises CheckpointError for a folder without weights, a damaged file or index, and a tensor that is there twice.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self._versions: dict[Path, tuple[int, ...]] = {}
        for file in checkpoint_files(folder):
            self.add(file)

    def add(self, file: Path, names: Mapping[str, str] | None = None) -> None:
        """Add the tensors of a file. names: their names here, by the names in the file."""
        if file.is_file():
            self._versions[file] = version_of(file)
        for tensor in read_header(file):
            name = tensor.name if names is None else names[tensor.name]
            if name in self.tensors:
                raise CheckpointError(f"The tensor {name!r} is in both {self.tensors[name].file.name} and {file.name}.")
            self.tensors[name] = tensor

    def find(self, *names: str) -> str | None:
        """Return the first of these names that is stored, also without the `model.` prefix or under older names."""
        for name in names:
            bare = name.removeprefix("model.")
            for form in (name, bare, OTHER_NAMES.get(name, name), f"{WITHIN}{bare}"):
                if form in self.tensors:
                    return form
        return None

    @contextmanager
    def opened(self, file: Path) -> Iterator[Any]:
        """Open a file. Raises CheckpointError where it has changed since, or cannot be read."""
        try:
            with open_tensors(file) as opened:
                yield opened
            if version_of(file) != self._versions[file]:
                raise CheckpointError(f"{file} has changed during the run. Start over with --overwrite.")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{file} cannot be read ({error}). Get it again, then go on with --resume."
            ) from error

    def read(self, wanted: Mapping[str, str], parts: Mapping[str, Any] | None = None) -> Iterator[tuple[str, Any]]:
        """Read tensors as they are stored, on the CPU, file by file.

        wanted: stored names, by the names to give them. parts: by these, the index of what to read where it is not all.
        Raises NumericalError for a NaN or Inf.
        """
        parts = parts or {}
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name, stored in wanted.items():
            by_file[self.tensors[stored].file].append(name)
        for file, names in by_file.items():
            while names:
                mapped = 0
                with self.opened(file) as opened:
                    while names and mapped < MAPPED:
                        name = names.pop(0)
                        inside = self.tensors[wanted[name]].name
                        tensor = opened.get_slice(inside)[parts[name]] if name in parts else opened.get_tensor(inside)
                        mapped += tensor.nbytes
                        if not is_finite(tensor):
                            raise NumericalError(
                                f"The weight {name!r} has a NaN or Inf. {file} is broken: get it again."
                            )
                        # A copy: what safetensors returns is a view of the mapped file. It would keep the file in
                        # memory and change with it, and lies unaligned, where products of matrices round differently.
                        yield name, tensor.clone()


def is_finite(tensor: Any) -> bool:
    import torch

    if tensor.dtype == torch.float8_e4m3fn:
        return not bool((tensor.view(torch.uint8) & 127 == 127).any())  # all other bytes are numbers
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def read_header(file: Path) -> list[StoredTensor]:
    """Read a file's header, no weights; safetensors checks that it fits the file.

    Raises CheckpointError for a damaged file or a type that is not known.
    """
    found = []
    with open_tensors(file, framework="np") as opened:
        for name in opened.keys():  # noqa: SIM118 (no dict)
            view = opened.get_slice(name)
            dtype = str(view.get_dtype())
            if dtype not in BITS:
                raise CheckpointError(f"{file} has {name!r} in a type that is not known here ({dtype}).")
            found.append(StoredTensor(file, name, dtype, tuple(view.get_shape())))
    return found


def open_tensors(file: Path, framework: str = "pt") -> Any:
    """Open a safetensors or GGUF file. Raises CheckpointError for a damaged one."""
    if file.suffix.lower() == ".gguf":
        from compress.models.gguf_weights import gguf_model

        return nullcontext(gguf_model(file))
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
        if length > LARGEST_HEADER:
            raise CheckpointError(f"{file} is damaged: its header claims {length:,} bytes. Download or write it again.")
        return safe_open(file, framework=framework, device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged ({error}). Download or write it again.") from error


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, from its index where it has one, or its GGUF file."""
    index = folder / INDEX
    if index.is_file():
        files = [folder / name for name in indexed_names(index)]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise CheckpointError(f"{index} names {absent[0]}, which is not there. Complete the download.")
        return files
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (gguf := gguf_of(folder)) is not None:
        return [gguf]
    pickles = [file.name for pattern in PICKLES for file in sorted(folder.glob(pattern))]
    if pickles:
        raise CheckpointError(
            f"{folder} holds weights only as a pickle ({pickles[0]}), which can run code when it is opened. "
            "Convert it to safetensors: load it with transformers where you trust it, then save_pretrained()."
        )
    raise CheckpointError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}.")


def gguf_of(folder: Path) -> Path | None:
    """The GGUF file that a folder stands for, by the name it was given with; None for a folder of safetensors."""
    file = folder / GGUF
    if not file.is_file() or (folder / INDEX).is_file() or (folder / SINGLE).is_file():
        return None
    given = folder / file.readlink() if file.is_symlink() else file
    return given if given.suffix.lower() == ".gguf" else file


def indexed_names(index: Path) -> list[str]:
    try:
        weight_map = parse_json(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        if not names or not all(isinstance(name, str) for name in names):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no safetensors index (a JSON object with a weight_map).") from error
    for name in names:
        if not is_own_name(name) or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} names {name!r}; an index may only name .safetensors files of its own folder."
            )
    return names


def is_own_name(name: Any) -> bool:
    """Whether a string is a plain file name, in the same folder."""
    is_name = isinstance(name, str) and name.isprintable() and len(name.encode()) <= LONGEST_NAME
    return is_name and Path(name).name == name and "\\" not in name


# Names of experts' linears in files; transformers fuses them while loading. In a model of ours they are
# `mlp.expert.3.gate_proj`: a name that is none of the files', so that transformers leaves them alone. Files have
# `mlp.experts.3.gate_proj`, Mixtral's `block_sparse_moe.experts.3.w1`, and some hold all experts fused as transformers
# has them: `mlp.experts.gate_up_proj` (experts, 2 inner, d), `mlp.experts.down_proj`.
OURS = re.compile(r"\.mlp\.expert\.(\d+)\.(gate|up|down)_proj\b")
APART = re.compile(r"\.mlp\.experts\.(\d+)\.")
MIXTRAL = re.compile(r"\.block_sparse_moe\.experts\.(\d+)\.(w[123])\b")
LETTERS = {"gate": "w1", "down": "w2", "up": "w3"}
PARTS = {letter: part for part, letter in LETTERS.items()}
DEEPSEEK = {".mlp.shared_expert.": ".mlp.shared_experts.", ".mlp.correction": ".mlp.gate.e_score_correction_bias"}


@dataclass(frozen=True)
class Piece:
    """An expert's weight in a fused tensor: `half` says which of the two that lie one below the other, None for all."""

    stored: str
    expert: int
    half: int | None = None

    def rows(self, height: int) -> slice:
        return slice(None) if self.half is None else slice(self.half * height // 2, (self.half + 1) * height // 2)


def file_name(name: str, model_type: str) -> str:
    """The name in a stock model's files of a tensor of ours."""
    if model_type == "deepseek_v3":
        for own, stored in DEEPSEEK.items():
            name = name.replace(own, stored)
    if model_type != "mixtral":
        return OURS.sub(r".mlp.experts.\1.\2_proj", name)
    name = OURS.sub(lambda found: f".block_sparse_moe.experts.{found[1]}.{LETTERS[found[2]]}", name)
    return name.replace(".mlp.gate.", ".block_sparse_moe.gate.")


def stored_forms(name: str) -> list[str]:
    """Names that a tensor may have in a file, fused ones left out."""
    return list(dict.fromkeys((name, *(file_name(name, model_type) for model_type in ("", "mixtral", "deepseek_v3")))))


def own_name(stored: str) -> str:
    """Our name of a tensor of a file."""
    name = MIXTRAL.sub(lambda found: f".mlp.expert.{found[1]}.{PARTS[found[2]]}_proj", stored)
    for own, theirs in DEEPSEEK.items():
        name = name.replace(theirs, own)
    return APART.sub(r".mlp.expert.\1.", name).replace(".block_sparse_moe.gate.", ".mlp.gate.")


def fused_piece(name: str) -> Piece | None:
    """Where an expert's weight is in a fused tensor; None for other tensors."""
    found = OURS.search(name)
    if found is None:
        return None
    half = {"gate": 0, "up": 1, "down": None}[found[2]]
    stored = f"{name[: found.start()]}.mlp.experts.{'down_proj' if half is None else 'gate_up_proj'}"
    return Piece(stored, int(found[1]), half)
