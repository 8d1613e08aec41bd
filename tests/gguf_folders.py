"""Small folders to be written as GGUF, and tokenizers of every kind that can be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from compress.checkpoints.gguf.tokenizer import BYTE_PIECES, SPLITS
from compress.checkpoints.verify import SAMPLE
from tiny import tiny_model, tiny_tokenizer

PLAIN = {"attention_bias": False, "mlp_bias": False}
# Embeddings for any of the tokenizers below, and some more.
ROOM = 420


def write_folder(
    folder: Path,
    model_type: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer: Any = None,
    **changes: Any,
) -> torch.nn.Module:
    """A tiny model and its tokenizer; a llama is without biases unless they are asked for."""
    options = (PLAIN if model_type == "llama" else {}) | changes
    model = tiny_model(model_type, dtype=dtype, **options)
    model.save_pretrained(folder, max_shard_size="20KB")
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    facts = {"form": None, "size": {"parameters": model.num_parameters()}, "unpacks_while_loading": False}
    (folder / "compress.json").write_text(json.dumps(facts))
    return model


def write_tokenizer(folder: Path, tokenizer: Any, **changes: Any) -> None:
    """A folder whose tokenizer matters, with the smallest of models."""
    write_folder(folder, tokenizer=tokenizer, num_hidden_layers=1, **changes)


TEXTS = [
    SAMPLE,
    "",
    "a",
    "def forward(self, x):\n        return x",
    "it's 12345 o'clock, isn't it?",
    "Grüße aus München; привет, мир; 你好世界; emoji 👩‍👩‍👧 \u200b end",
    "tabs\tand\r\nlines\n\n\nand trailing spaces   ",
    "text</s>",
]
LLAMA3_SPLIT, QWEN2_SPLIT = SPLITS
CORPUS = [SAMPLE, *TEXTS, "the quick brown fox's tail, the 12345 lazy dogs' 2024 beds; the def return self x x x"] * 3


def byte_level(split: str | None = None, *, size: int = 320, added: tuple[Any, ...] = (), **options: Any) -> Any:
    """A byte-level BPE with merges, trained in milliseconds, cut as GPT-2 does or by `split`."""
    backend = Tokenizer(models.BPE())
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    splits = [] if split is None else [pre_tokenizers.Split(Regex(split), behavior="isolated", invert=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, cut]) if splits else cut
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", **options
    )
    tokenizer.add_tokens(list(added))
    return tokenizer


def sentencepiece(kind: str = "llama", *, drop: int = 0) -> Any:
    """Llama's SentencePiece: byte fallback, and every way to make a piece of two is a merge.

    kind: by transformers' class, `gemma`'s too, or as older files have it, with normalizers. drop: merges to leave out.
    """
    words = ["the", "def", "return", "self", "in", "is", "te", "it", "ste", "st", "test", "year", "▁x", "ï", "京"]
    marked = [f"▁{word}" for word in words if word[0] != "▁"]
    pieces = dict.fromkeys(word[:end] for word in [*words, *marked] for end in range(2, len(word) + 1))
    characters = sorted({*"▁ \n\t.,'()*:", *"abcdefghijklmnopqrstuvwxyz0123456789", *"".join(pieces)} - {" "})
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"] if kind == "gemma" else ["<unk>", "<s>", "</s>"]
    tokens = [*special, *BYTE_PIECES, *pieces, *characters]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ][drop:]
    if kind != "older":
        return {"llama": LlamaTokenizer, "gemma": GemmaTokenizer}[kind](vocab=vocabulary, merges=merges)
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "bytes alone": (tiny_tokenizer, "gpt2", "gpt-2"),
    "gpt-2": (byte_level, "gpt2", "gpt-2"),
    "llama 3": (lambda: byte_level(LLAMA3_SPLIT), "gpt2", "llama-bpe"),
    "qwen2": (lambda: byte_level(QWEN2_SPLIT), "gpt2", "qwen2"),
    "sentencepiece": (sentencepiece, "llama", "default"),
    "sentencepiece, older": (lambda: sentencepiece("older"), "llama", "default"),
}
