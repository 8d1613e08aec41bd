"""A tokenizer as GGUF has it: three byte-level BPEs and the SentencePiece of Llama and Gemma. Any other is refused.

`state` is what tokenizers writes of one, the content of its tokenizer.json.
"""

import itertools
import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers

from compress.checkpoints.files import write_json
from compress.errors import UnsupportedModel
from compress.models.loading import check_vocabulary, load_tokenizer

# llama.cpp's names for how a byte-level BPE cuts text before it merges; gpt-2's cut is tokenizers' own.
GPT2 = "gpt-2"
SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}
SPACE = "\u2581"  # SentencePiece's
GEMMAS = ("gemma", "gemma2", "gemma3_text")  # whose SentencePiece puts no space before a text
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
PREPENDED = [
    {"type": "Prepend", "prepend": SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
]
# After them there is nothing to cut.
AT_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as a GGUF file has it.

    kind: `gpt2` for byte-level merges, `llama` for SentencePiece. With the latter llama.cpp puts a space before text
        after any special token, as older tokenizers do; newer ones and transformers' reader put it at the start alone.
        Gemma's has none. prefixed: whether there is one.
    cut: llama.cpp's name for how text is cut before merging.
    scores: of a piece of SentencePiece, the higher the earlier it is merged.
    special: gguf's SpecialVocab, with the merges, the ids of special tokens, which of them are added, chat templates.
    """

    kind: str
    cut: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    special: Any
    prefixed: bool


def read_vocabulary(folder: Path, config: Any) -> Vocabulary:
    """The tokenizer of a folder, as AutoTokenizer makes it, for a model of this config.

    Raises UnsupportedModel if a GGUF file cannot say it, CheckpointError if there is none or it is another model's.
    """
    from gguf import TokenType

    tokenizer = load_tokenizer(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: dict[str, Any]
    state = {"model": {"type": type(tokenizer).__name__}} if backend is None else json.loads(backend.to_str())
    prefixed = getattr(config, "text_config", config).model_type not in GEMMAS
    reason, ends = why_not_sayable(state, prefixed), None
    if reason is None and (ends := added_ends(tokenizer)) is None:
        reason = f"it makes {tokenizer.encode('a')} of 'a', more than a beginning and an end of text"
    if reason is not None:
        raise UnsupportedModel(
            f"The tokenizer of {folder} cannot be written as GGUF: {reason}. GGUF is written for the byte-level BPE of "
            "GPT-2, Llama 3 and Qwen2 and for the SentencePiece of Llama and Gemma. Leave GGUF out: transformers loads "
            "the folder without it."
        )
    vocabulary, size = tokenizer.get_vocab(), config.vocab_size
    check_vocabulary(torch.tensor(list(vocabulary.values())), config, folder)
    special = special_vocab(tokenizer, config)
    special.add_special_token = ends  # SpecialVocab guesses them from the tokenizer's files
    # By number. Embeddings without a token get a name: the file has one for every row.
    tokens, types = [f"[PAD{number}]" for number in range(size)], [int(TokenType.UNUSED)] * size
    for token, number in vocabulary.items():
        tokens[number], types[number] = token, TokenType.NORMAL
    for token in state["added_tokens"]:
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    if has_byte_level(state):
        return Vocabulary("gpt2", str(cut_name(state)), tokens, types, None, special, prefixed)
    pieces, unknown = state["model"]["vocab"], special.special_token_ids.get("unk")
    marked = {pieces[piece]: TokenType.BYTE for piece in BYTE_PIECES}
    marked |= {} if unknown is None else {unknown: TokenType.UNKNOWN}
    types = [int(marked.get(number, usual)) for number, usual in enumerate(types)]
    return Vocabulary("llama", "default", tokens, types, piece_scores(state, size), special, prefixed)


def special_vocab(tokenizer: Any, config: Any) -> Any:
    """gguf's SpecialVocab of a tokenizer and a config, read from files as transformers writes them.

    Where several tokens end a text, GGUF has room for the first.
    """
    import gguf

    logging.getLogger("gguf.vocab").setLevel(logging.ERROR)  # it warns of the ends that it guesses
    usable = {}
    for kind in ("bos", "eos", "unk", "pad"):
        number = getattr(config, f"{kind}_token_id", None)
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and number >= 0:
            usable[f"{kind}_token_id"] = number
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        write_json(Path(scratch) / "config.json", usable)
        return gguf.SpecialVocab(scratch, load_merges=True, n_vocab=config.vocab_size)


def added_ends(tokenizer: Any) -> dict[str, bool] | None:
    """Whether the tokenizer puts bos before a text and eos after it; None where it adds anything else."""
    bare, whole = (list(tokenizer.encode("a", add_special_tokens=added)) for added in (False, True))
    for bos, eos in itertools.product((False, True), repeat=2):
        if whole == [tokenizer.bos_token_id] * bos + bare + [tokenizer.eos_token_id] * eos:
            return {"bos": bos, "eos": eos}
    return None


def piece_scores(state: Mapping[str, Any], size: int) -> list[float]:
    """By token: minus the rank of the piece; what is never merged comes last, and bytes score nothing."""
    ranks = {piece: rank for rank, piece in enumerate(dict.fromkeys(map("".join, merges_of(state))))}
    scores = dict.fromkeys(range(size), -float(len(ranks)))
    scores |= {number: -float(ranks.get(piece, len(ranks))) for piece, number in state["model"]["vocab"].items()}
    scores |= {state["model"]["vocab"][piece]: 0.0 for piece in BYTE_PIECES}
    return list(scores.values())


def why_not_sayable(state: Mapping[str, Any], prefixed: bool) -> str | None:
    """What of a tokenizer a GGUF file cannot say, if anything. prefixed: see `Vocabulary`."""
    model = state["model"]
    if model["type"] != "BPE":
        return f"it is a {model['type']} model, not BPE"
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            return f"it has a {option}"
    reason = why_not_byte_level(state) if has_byte_level(state) else why_not_sentencepiece(state, prefixed)
    # Added tokens stand in the file without their options.
    return reason or next(
        (
            f"its added token {token['content']!r} has the option {option}"
            for token in state["added_tokens"]
            for option in ("single_word", "lstrip", "rstrip")
            if token[option]
        ),
        None,
    )


def steps(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer as its steps in their order, without the brackets of a Sequence."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [flat for nested in step.get("normalizers", step.get("pretokenizers")) for flat in steps(nested)]


def has_byte_level(state: Mapping[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in steps(state["pre_tokenizer"]))


def cut_name(state: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for the pre-tokenizer of a byte-level BPE, None if it is not a known one."""
    *splits, last = steps(state["pre_tokenizer"])
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if not splits:
        return GPT2 if last["use_regex"] else None
    # To keep the matches and to remove what lies between them is the same: the expressions match everything.
    keeps = (splits[0].get("behavior"), splits[0].get("invert")) in (("Isolated", False), ("Removed", True))
    if len(splits) > 1 or splits[0]["type"] != "Split" or not keeps or last["use_regex"]:
        return None
    return SPLITS.get(splits[0]["pattern"].get("Regex", ""))


def why_not_byte_level(state: Mapping[str, Any]) -> str | None:
    if cut_name(state) is None:
        return "it cuts text in a way of its own (its pre_tokenizer is not a known one)"
    # NFC is Qwen2's; neither llama.cpp nor transformers' reader applies it, and text nearly always is NFC.
    if other := [step["type"] for step in steps(state["normalizer"]) if step["type"] != "NFC"]:
        return f"it has a normalizer {other[0]}"
    # transformers' reader spells any other character in bytes and no longer finds the token.
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    added = (token["content"] for token in state["added_tokens"])
    odd = next((content for content in added if not set(content) <= alphabet), None)
    return None if odd is None else f"its added token {odd!r} has characters outside the byte alphabet"


def why_not_sentencepiece(state: Mapping[str, Any], prefixed: bool) -> str | None:
    model = state["model"]
    if not model["byte_fallback"] or model.get("ignore_merges"):
        return "it is neither byte-level nor SentencePiece with byte fallback"
    if absent := next((byte for byte in BYTE_PIECES if byte not in model["vocab"]), None):
        return f"it has byte fallback but no token {absent}"
    if not marks_spaces(state, prefixed):
        before = "one before the text, as Llama's" if prefixed else "none before the text, as Gemma's"
        return f"it does not put {SPACE!r} for spaces and {before} SentencePiece does"
    if not merges_any_piece(state):
        return "its merges are not all that its vocabulary allows, which is what llama.cpp merges"
    return None


def marks_spaces(state: Mapping[str, Any], prefixed: bool) -> bool:
    """By a pre-tokenizer, or by normalizers as older files and Gemma's have it."""
    normalizers, cuts = steps(state["normalizer"]), steps(state["pre_tokenizer"])
    if cuts in ([], [AT_SPACES]):
        return normalizers == (PREPENDED if prefixed else PREPENDED[1:])
    return (
        prefixed
        and not normalizers
        and [cut["type"] for cut in cuts] == ["Metaspace"]
        and cuts[0]["replacement"] == SPACE
        and cuts[0]["prepend_scheme"] in ("first", "always")
        and not cuts[0].get("split", True)
    )


def merges_of(state: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges, the first to be applied first. Files before tokenizers 0.20 have each in one string."""
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in state["model"]["merges"])
    return [(left, right) for left, right in pairs]


def merges_any_piece(state: Mapping[str, Any]) -> bool:
    """Whether merging by rank, as tokenizers does, is merging by the score of the piece made, as llama.cpp does.

    It is if every two pieces whose concatenation is one are merged, and all ways to a piece have neighboring ranks.
    """
    pieces = state["model"]["vocab"].keys() - {token["content"] for token in state["added_tokens"]} - set(BYTE_PIECES)
    possible = {
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if all(part in pieces or len(part) == 1 for part in (piece[:cut], piece[cut:]))
    }
    merges = merges_of(state)
    made = [piece for piece, _ in itertools.groupby(map("".join, merges)) if piece in pieces]
    return possible <= set(merges) and len(made) == len(set(made))
