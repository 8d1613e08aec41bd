"""A folder's tokenizer as the lists of a GGUF file: tokens, their types, merges or scores, and the special ones."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.checkpoints.gguf.kinds import byte_pieces, cut_name, has_byte_level, merges_of, why_not_sayable
from compress.errors import UnsupportedModel
from compress.models.loading import check_vocabulary, load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    kind: `gpt2` for byte-level merges, `llama` for SentencePiece. With the latter llama.cpp puts a space before text
        after any special token, as older tokenizers do; newer ones and transformers' reader put it at the start alone.
    cut: llama.cpp's name for how text is cut before merging.
    scores: of a piece of SentencePiece, the higher the earlier it is merged.
    ids: of bos, eos, unk and pad, as far as there are any.
    """

    kind: str
    cut: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float] | None
    ids: dict[str, int]
    adds_bos: bool
    adds_eos: bool
    templates: list[dict[str, str]]


def read_vocabulary(folder: Path, config: Any) -> Vocabulary:
    """The tokenizer of a folder, as AutoTokenizer makes it, for a model of this config.

    Raises UnsupportedModel if a GGUF file cannot say it, CheckpointError if there is none or it is another model's.
    """
    tokenizer = load_tokenizer(folder)
    state = state_of(tokenizer)
    if reason := why_not_sayable(state):
        raise unsayable(folder, reason)
    tokens = tokenizer.get_vocab()
    check_vocabulary(torch.tensor(list(tokens.values())), config, folder)
    byte_level = has_byte_level(state)
    ids = special_ids(tokenizer, config)
    adds_bos, adds_eos = added_ends(tokenizer, folder)
    return Vocabulary(
        kind="gpt2" if byte_level else "llama",
        cut=str(cut_name(state)) if byte_level else "default",
        tokens=token_list(tokens, config.vocab_size),
        types=token_types(state, tokens, config.vocab_size, unknown=ids.get("unk")),
        merges=[" ".join(merge) for merge in merges_of(state)],
        scores=None if byte_level else piece_scores(state, config.vocab_size),
        ids=ids,
        adds_bos=adds_bos,
        adds_eos=adds_eos,
        templates=templates_of(tokenizer),
    )


def unsayable(folder: Path, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"The tokenizer of {folder} cannot be written as GGUF: {reason}. GGUF is written for the byte-level BPE of "
        "GPT-2, Llama 3 and Qwen2 and for Llama's SentencePiece. Leave GGUF out: transformers loads the folder without "
        "it."
    )


def state_of(tokenizer: Any) -> dict[str, Any]:
    """What tokenizers writes of a tokenizer; of one that is not its own, the name of its class."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {"model": {"type": type(tokenizer).__name__}}
    state: dict[str, Any] = json.loads(backend.to_str())
    return state


def piece_scores(state: Mapping[str, Any], size: int) -> list[float]:
    """By token: minus the rank of the piece; what is never merged comes last, and bytes score nothing."""
    merges = merges_of(state)
    ranks = {piece: rank for rank, piece in enumerate(dict.fromkeys(left + right for left, right in merges))}
    scores = [-float(len(ranks))] * size
    for piece, number in state["model"]["vocab"].items():
        scores[number] = -float(ranks.get(piece, len(ranks)))
    for piece in byte_pieces():
        scores[state["model"]["vocab"][piece]] = 0.0
    return scores


def token_list(vocabulary: Mapping[str, int], size: int) -> list[str]:
    """The tokens by number. Embeddings without a token get a name: the file has one for every row."""
    tokens = [f"[PAD{number}]" for number in range(size)]
    for token, number in vocabulary.items():
        tokens[number] = token
    return tokens


def token_types(
    state: Mapping[str, Any], vocabulary: Mapping[str, int], size: int, *, unknown: int | None
) -> list[int]:
    types = [UNUSED] * size
    for number in vocabulary.values():
        types[number] = NORMAL
    for token in state["added_tokens"]:
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    if not has_byte_level(state):
        for piece in byte_pieces():
            types[state["model"]["vocab"][piece]] = BYTE
        if unknown is not None:
            types[unknown] = UNKNOWN
    return types


def special_ids(tokenizer: Any, config: Any) -> dict[str, int]:
    """From the tokenizer, else from the config, whose end of text may be several tokens: the first."""
    ids = {}
    for kind in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{kind}_token_id", None)
        if number is None:
            number = getattr(config, f"{kind}_token_id", None)
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and 0 <= number < config.vocab_size:
            ids[kind] = number
    return ids


def added_ends(tokenizer: Any, folder: Path) -> tuple[bool, bool]:
    """Whether the tokenizer puts the beginning of text before a text, and the end of text after it."""
    bare, whole = (list(tokenizer.encode("a", add_special_tokens=added)) for added in (False, True))
    for adds_bos, adds_eos in itertools.product((False, True), repeat=2):
        if whole == [tokenizer.bos_token_id] * adds_bos + bare + [tokenizer.eos_token_id] * adds_eos:
            return adds_bos, adds_eos
    raise unsayable(folder, f"it makes {whole} of {bare}, more than a beginning and an end of text")


def templates_of(tokenizer: Any) -> list[dict[str, str]]:
    templates = getattr(tokenizer, "chat_template", None) or {}
    templates = {"default": templates} if isinstance(templates, str) else templates
    return [{"name": name, "template": template} for name, template in templates.items()]
