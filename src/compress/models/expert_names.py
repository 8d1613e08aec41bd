"""Names of experts' linears in checkpoint files; transformers fuses them while loading.

In a model of ours they are `mlp.expert.3.gate_proj`: a name that is none of the files', so that transformers leaves
them alone. Files have `mlp.experts.3.gate_proj`, Mixtral's `block_sparse_moe.experts.3.w1`, and some hold all experts
fused as transformers has them: `mlp.experts.gate_up_proj` (experts, 2 inner, d), `mlp.experts.down_proj`.
"""

import re
from dataclasses import dataclass

OURS = re.compile(r"\.mlp\.expert\.(\d+)\.(gate|up|down)_proj\b")
APART = re.compile(r"\.mlp\.experts\.(\d+)\.")
MIXTRAL = re.compile(r"\.block_sparse_moe\.experts\.(\d+)\.(w[123])\b")
LETTERS = {"gate": "w1", "down": "w2", "up": "w3"}
PARTS = {letter: part for part, letter in LETTERS.items()}


@dataclass(frozen=True)
class Piece:
    """An expert's weight in a fused tensor: `half` says which of the two that lie one below the other, None for all."""

    stored: str
    expert: int
    half: int | None = None

    def rows(self, height: int) -> slice:
        if self.half is None:
            return slice(None)
        return slice(self.half * height // 2, (self.half + 1) * height // 2)


def file_name(name: str, model_type: str) -> str:
    """The name in a stock model's files of a tensor of ours."""
    return as_mixtral(name) if model_type == "mixtral" else as_apart(name)


def stored_forms(name: str) -> list[str]:
    """Names that a tensor may have in a file, fused ones left out."""
    return list(dict.fromkeys((name, as_apart(name), as_mixtral(name))))


def own_name(stored: str) -> str:
    """Our name of a tensor of a file."""
    name = MIXTRAL.sub(lambda found: f".mlp.expert.{found[1]}.{PARTS[found[2]]}_proj", stored)
    return APART.sub(r".mlp.expert.\1.", name).replace(".block_sparse_moe.gate.", ".mlp.gate.")


def fused_piece(name: str) -> Piece | None:
    """Where an expert's weight is in a fused tensor; None for other tensors."""
    found = OURS.search(name)
    if found is None:
        return None
    half = {"gate": 0, "up": 1, "down": None}[found[2]]
    stored = f"{name[: found.start()]}.mlp.experts.{'down_proj' if half is None else 'gate_up_proj'}"
    return Piece(stored, int(found[1]), half)


def as_apart(name: str) -> str:
    return OURS.sub(r".mlp.experts.\1.\2_proj", name)


def as_mixtral(name: str) -> str:
    name = OURS.sub(lambda found: f".block_sparse_moe.experts.{found[1]}.{LETTERS[found[2]]}", name)
    return name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
