"""The tokenizers that a GGUF file can say: three byte-level BPEs, and Llama's SentencePiece.

`state` is what tokenizers writes of one, the content of its tokenizer.json.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import pre_tokenizers

# How byte-level tokenizers cut text before they merge; the names are llama.cpp's.
GPT2 = "gpt-2"
SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}
# SentencePiece's space.
SPACE = "\u2581"


def why_not_sayable(state: Mapping[str, Any]) -> str | None:
    """What of a tokenizer a GGUF file cannot say, if anything."""
    reason = why_not_bpe(state["model"])
    return reason or (why_not_byte_level(state) if has_byte_level(state) else why_not_sentencepiece(state))


def why_not_bpe(model: Mapping[str, Any]) -> str | None:
    if model["type"] != "BPE":
        return f"it is a {model['type']} model, not BPE"
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            return f"it has a {option}"
    return None


def steps_of(state: Mapping[str, Any], part: str, inner: str) -> list[dict[str, Any]]:
    """The normalizers or pre-tokenizers in their order, without the brackets of a Sequence."""
    step = state[part]
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [flat for nested in step[inner] for flat in steps_of({part: nested}, part, inner)]
    return [step]


def has_byte_level(state: Mapping[str, Any]) -> bool:
    steps = steps_of(state, "pre_tokenizer", "pretokenizers") if "pre_tokenizer" in state else []
    return any(step["type"] == "ByteLevel" for step in steps)


def cut_name(state: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for the pre-tokenizer of a byte-level BPE, None if it is not a known one."""
    *splits, last = steps_of(state, "pre_tokenizer", "pretokenizers")
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
    if other := [s["type"] for s in steps_of(state, "normalizer", "normalizers") if s["type"] != "NFC"]:
        return f"it has a normalizer {other[0]}"
    # transformers' reader spells any other character in bytes and no longer finds the token.
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    return why_not_added(state) or next(
        (
            f"its added token {token['content']!r} has characters outside the byte alphabet"
            for token in state["added_tokens"]
            if not set(token["content"]) <= alphabet
        ),
        None,
    )


def why_not_added(state: Mapping[str, Any]) -> str | None:
    """Added tokens stand in the file without their options."""
    for token in state["added_tokens"]:
        for option in ("single_word", "lstrip", "rstrip"):
            if token[option]:
                return f"its added token {token['content']!r} has the option {option}"
    return None


def why_not_sentencepiece(state: Mapping[str, Any]) -> str | None:
    model = state["model"]
    if not model["byte_fallback"] or model.get("ignore_merges"):
        return "it is neither byte-level nor SentencePiece with byte fallback"
    if absent := next((byte for byte in byte_pieces() if byte not in model["vocab"]), None):
        return f"it has byte fallback but no token {absent}"
    normalizers = steps_of(state, "normalizer", "normalizers")
    cuts = steps_of(state, "pre_tokenizer", "pretokenizers")
    if not (is_metaspace(normalizers, cuts) or is_prepended(normalizers, cuts)):
        return f"it does not put {SPACE!r} for spaces and one before the text, as Llama's SentencePiece does"
    if not merges_any_piece(state):
        return "its merges are not all that its vocabulary allows, which is what llama.cpp merges"
    return why_not_added(state)


def is_metaspace(normalizers: Sequence[Mapping[str, Any]], cuts: Sequence[Mapping[str, Any]]) -> bool:
    if normalizers or [cut["type"] for cut in cuts] != ["Metaspace"]:
        return False
    return (
        cuts[0]["replacement"] == SPACE
        and cuts[0]["prepend_scheme"] in ("first", "always")
        and not cuts[0].get("split", True)
    )


def is_prepended(normalizers: Sequence[Mapping[str, Any]], cuts: Sequence[Mapping[str, Any]]) -> bool:
    return not cuts and list(normalizers) == [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ]


def byte_pieces() -> list[str]:
    return [f"<0x{byte:02X}>" for byte in range(256)]


def merges_of(state: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges, the first to be applied first. Files before tokenizers 0.20 have each in one string."""
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in state["model"]["merges"])
    return [(left, right) for left, right in pairs]


def merges_any_piece(state: Mapping[str, Any]) -> bool:
    """Whether merging by rank, as tokenizers does, is merging by the score of the piece made, as llama.cpp does.

    It is if every two pieces whose concatenation is one are merged, and all ways to a piece have neighbouring ranks.
    """
    special = {token["content"] for token in state["added_tokens"]} | set(byte_pieces())
    pieces = state["model"]["vocab"].keys() - special
    possible = {
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if all(part in pieces or len(part) == 1 for part in (piece[:cut], piece[cut:]))
    }
    merges = merges_of(state)
    made = [piece for piece, _ in itertools.groupby(left + right for left, right in merges) if piece in pieces]
    return possible <= set(merges) and len(made) == len(set(made))
