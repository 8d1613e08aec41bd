"""Which quantized type each tensor has in a GGUF file of a type such as Q4_K_M.

The rules are those of llama-quantize with an importance matrix: tensors that matter most get more bits, and rows that
are no whole blocks of 256 fall back to a type of blocks of 32.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from compress.errors import UnsupportedModel, unknown_name
from compress.models.gguf_header import WRITTEN, tensor_names
from compress.models.gguf_weights import check_extra
from compress.numerics.block_types import TYPES

FILE_TYPES = (
    *("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0"),
    *("IQ4_NL", "IQ4_XS"),
)
PLAIN = "F16"  # of rows that are no whole blocks
SMALLER_BLOCKS = {
    "Q2_K": "IQ4_NL",
    "Q3_K": "IQ4_NL",
    "IQ4_XS": "IQ4_NL",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
AUTO = "auto"  # every tensor has a type of its own, found under a budget
LADDERS = {  # the types that tensors whose rows are whole blocks may get then, from the smallest
    256: ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0"),
    32: ("IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
}
MOSTLY = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # what a file is called that has most of a type
MANY_QUERIES = 4  # query heads a key-value head
EXAMPLE = "Q4_K_M, or Q4_K_M,ffn_down=Q6_K"


@dataclass(frozen=True)
class FileType:
    """A file's type, and types of tensors by patterns of their GGUF names, the last that fits first."""

    name: str
    overrides: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> "FileType":
        """Read `Q4_K_M` or `Q4_K_M,attn_v=Q6_K,blk.0.*=Q8_0`. Raises ValueError for a type that does not exist."""
        name, *others = (word.strip() for word in text.split(","))
        if name not in FILE_TYPES:
            raise ValueError(unknown_name("GGUF type", name, FILE_TYPES) + f" Write {EXAMPLE}.")
        overrides = list[tuple[str, str]]()
        for other in others:
            pattern, equals, wanted = (word.strip() for word in other.partition("="))
            if not equals or not pattern:
                raise ValueError(f"{other!r} is no PATTERN=TYPE. Write {EXAMPLE}.")
            if wanted not in TYPES:
                raise ValueError(unknown_name("GGUF tensor type", wanted, TYPES))
            overrides.insert(0, (pattern, wanted))
        return cls(name, tuple(overrides))

    def of(self, tensor: str, inputs: int, *, blocks: int, queries: int, tied: bool) -> str:
        """The type of a tensor.

        tensor: its name in GGUF, such as blk.3.attn_v. inputs: the length of its rows. blocks: of the model.
        queries: query heads that share a key-value head. tied: whether the head shares the embeddings' table.
        """
        part = tensor.rpartition(".")[2]
        for pattern, wanted in self.overrides:
            if fnmatchcase(tensor, pattern) or pattern == part:
                return fitting(wanted, inputs)
        usual = self.name.removesuffix("_S").removesuffix("_M").removesuffix("_L")
        if part == "output" or (part == "token_embd" and tied):
            return fitting("Q8_0" if usual == "Q8_0" else "Q6_K", inputs)
        if part == "token_embd":
            return fitting(usual, inputs)
        return fitting(raised(self.name, part, int(tensor.split(".")[1]), blocks, queries) or usual, inputs)


def candidates(inputs: int) -> tuple[str, ...]:
    """The types that a tensor with rows of `inputs` weights may get where each has its own, from the smallest."""
    return next((types for block, types in LADDERS.items() if inputs % block == 0), ())


def row_bytes(name: str, inputs: int) -> int:
    return TYPES[name].bytes * (inputs // TYPES[name].block)


def file_type_of(text: str, types: Mapping[str, str]) -> str:
    """What a file is called whose type was asked for by `text` and whose tensors have these; empty for plain ones."""
    if text != AUTO:
        return FileType.parse(text).name
    common = Counter(types.values()).most_common(1)
    return MOSTLY.get(common[0][0], common[0][0]) if common else ""


def misfits(types: Mapping[str, str], rows: Mapping[str, int]) -> list[str]:
    """What is wrong with types by path. rows: the inputs of the matrices that there are."""
    unknown = [path for path in types if path not in rows]
    problems = [f"There is no matrix {unknown[0]!r} to give a GGUF type."] if unknown else []
    for path, name in types.items():
        if name not in TYPES:
            problems.append(unknown_name("GGUF tensor type", name, TYPES))
        elif rows.get(path, 0) % TYPES[name].block:
            problems.append(f"{path} has rows of {rows[path]}, which are no whole blocks of {name}. Take another type.")
    return problems[:3]


def fitting(wanted: str, inputs: int) -> str:
    """The type, or what replaces it for rows of `inputs` weights."""
    if inputs % TYPES[wanted].block:
        wanted = SMALLER_BLOCKS.get(wanted, PLAIN)
    return PLAIN if wanted == PLAIN or inputs % TYPES[wanted].block else wanted


def raised(file_type: str, part: str, block: int, blocks: int, queries: int) -> str | None:
    """The type of a tensor that gets more bits than most; None for the others."""
    first, last = block < blocks // 8, block >= 7 * blocks // 8
    matters = first or last or (block - blocks // 8) % 3 == 2
    many = "Q5_K" if queries >= MANY_QUERIES else None
    rules: dict[str, dict[str, str | None]] = {
        "attn_v": {
            "Q2_K": "Q4_K" if queries >= MANY_QUERIES else "Q3_K",
            "Q3_K_M": "Q5_K" if block < 2 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "IQ4_NL": many,
            "IQ4_XS": many,
            "Q4_K_S": "Q5_K" if block < 4 else None,
            "Q4_K_M": "Q6_K" if matters else None,
            "Q5_K_M": "Q6_K" if matters else None,
        },
        "ffn_down": {
            "Q2_K": "Q3_K",
            "Q3_K_M": "Q5_K" if block < blocks // 16 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "Q4_0": "Q4_1" if first else None,
            "Q5_0": "Q5_1" if first else None,
            "Q4_K_S": "Q5_K" if first else None,
            "Q4_K_M": "Q6_K" if matters else None,
            "Q5_K_M": "Q6_K" if matters else None,
        },
        "attn_output": {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"},
        "attn_qkv": {"Q3_K_M": "Q4_K", "Q3_K_L": "Q4_K", "Q4_K_M": "Q5_K", "Q5_K_M": "Q6_K"},
    }
    return rules.get(part, {}).get(file_type)


def check_named(config: Any) -> None:
    """Raises UnsupportedModel for a model that files are not written for, UsageError without the extra."""
    check_extra("Writing")
    if config.model_type not in WRITTEN:
        kind = "our own architecture" if config.model_type == "compress" else f"model_type {config.model_type!r}"
        raise UnsupportedModel(f"GGUF is not written for {kind}, only for {', '.join(WRITTEN)}. Use --bits.")


def resolve(text: str, config: Any, rows: Iterable[tuple[str, int]]) -> dict[str, str]:
    """The types of matrices, by path; those that no type fits left out.

    config: of the model that is written. rows: the paths of the matrices below the causal LM, and their inputs.
    Raises what `check_named` does.
    """
    check_named(config)
    file_type, names = FileType.parse(text), tensor_names(WRITTEN[config.model_type], config.num_hidden_layers)
    queries = config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    options = {"blocks": config.num_hidden_layers, "queries": queries, "tied": config.tie_word_embeddings}
    found = {path: file_type.of(names.get_name(path), inputs, **options) for path, inputs in rows}
    return {path: name for path, name in found.items() if name != PLAIN}
