"""Token windows: what a model is calibrated and evaluated on.

Evaluation follows GPTQ (arXiv 2210.17323), SparseGPT and SliceGPT to the letter: the rows of the test split are joined
with a blank line and tokenized once, so with one BOS in all where the tokenizer adds one; windows do not overlap; the
tail is dropped.

Calibration on a data set draws seeded places of its train split, and each window starts at the start of a line with
the tokenizer's own special tokens, as generation does. The codes of GPTQ and SparseGPT tokenize the whole split and cut
anywhere, so that a window starts in the midst of a word and without a BOS; SliceGPT's starts at a random row. A file of
the user's is cut like an evaluation text; windows spread evenly over all of it are taken, so that a long file counts
whole.

Unit: tokens. A window is never padded.
"""

import hashlib
import random
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compress.calibration.streams import spread
from compress.datasets import SEPARATOR, load_rows
from compress.datasets._sources import is_file
from compress.errors import UsageError

# More characters than a token has on average in any text: so many hold the tokens that are needed.
CHARACTERS_PER_TOKEN = 8
# A passage ends anywhere, perhaps within a word. The tokens of that word are past the window by this many tokens.
MARGIN = 32


def calibration_windows(
    source: str, tokenizer: PreTrainedTokenizerBase, *, num_samples: int, seq_len: int, seed: int, data_dir: Path | None
) -> Int64[Tensor, "num_samples seq_len"]:
    """Windows spread evenly over a text file, or windows from random places of a data set's train split."""
    rows = load_rows(source, "train", data_dir)
    if is_file(source):
        windows = cut(encode(tokenizer, SEPARATOR.join(rows)), seq_len)
        if len(windows) < num_samples:
            raise too_little_text(source, len(windows), num_samples, seq_len)
        return spread(windows, num_samples)
    return sample(Text(source, rows), tokenizer, num_samples, seq_len, seed)


def evaluation_windows(
    source: str, tokenizer: PreTrainedTokenizerBase, *, seq_len: int, data_dir: Path | None, limit: int | None = None
) -> Int64[Tensor, "windows seq_len"]:
    """The windows of a data set's test split or of a text file, at most `limit`."""
    tokens = encode(tokenizer, SEPARATOR.join(load_rows(source, "test", data_dir)))
    windows = cut(tokens, seq_len)
    if not len(windows):
        raise too_little_text(source, 0, 1, seq_len)
    return windows[:limit]


def fingerprint(windows: Int64[Tensor, "windows seq_len"]) -> str:
    """SHA-256 over the shape and the tokens, as little-endian int64."""
    shape = torch.tensor(windows.shape, dtype=torch.int64)
    digest = hashlib.sha256()
    for integers in (shape, windows.cpu()):
        digest.update(integers.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


class Text:
    """Rows joined as a circle: reading goes on at the start when it comes to the end. Only passages are ever joined."""

    def __init__(self, name: str, rows: list[str]) -> None:
        self.name = name
        self.rows = rows
        *self.starts, self.length = accumulate((len(row) + len(SEPARATOR) for row in rows), initial=0)

    def passage(self, offset: int, length: int) -> str:
        """`length` characters from the first line that starts after the offset; blank lines are no start."""
        index = bisect_right(self.starts, offset) - 1
        _, _, rest = self.rows[index][offset - self.starts[index] :].partition("\n")
        passage = rest.lstrip("\n")
        while len(passage) < length:
            index = (index + 1) % len(self.rows)
            passage = passage + SEPARATOR + self.rows[index] if passage else self.rows[index].lstrip("\n")
        return passage[:length]


def sample(
    text: Text, tokenizer: PreTrainedTokenizerBase, num_samples: int, seq_len: int, seed: int
) -> Int64[Tensor, "num_samples seq_len"]:
    """Windows from seeded random places. They may overlap, as in the papers, but not for want of text."""
    if text.length < CHARACTERS_PER_TOKEN * num_samples * seq_len:
        available = len(encode(tokenizer, SEPARATOR.join(text.rows))) // seq_len
        if available < num_samples:
            raise too_little_text(text.name, available, num_samples, seq_len)
    generator = random.Random(seed)
    offsets = [generator.randrange(text.length) for _ in range(num_samples)]
    return torch.stack([window_at(text, offset, tokenizer, seq_len) for offset in offsets])


def window_at(text: Text, offset: int, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Int64[Tensor, "seq_len"]:
    """The window that starts at the first line after the offset."""
    length = CHARACTERS_PER_TOKEN * seq_len + MARGIN
    while True:
        tokens = encode(tokenizer, text.passage(offset, length))
        twice_around = length >= 2 * text.length
        if len(tokens) >= seq_len + (0 if twice_around else MARGIN):
            return tokens[:seq_len]
        if twice_around:
            raise too_little_text(text.name, 0, 1, seq_len)
        length *= 2


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Int64[Tensor, "tokens"]:
    """The tokens of a text, special ones included. Not verbose: a text may be longer than the model's context."""
    tokens = tokenizer(text, verbose=False, return_attention_mask=False)["input_ids"]
    return torch.tensor(tokens, dtype=torch.int64)


def cut(tokens: Int64[Tensor, "tokens"], seq_len: int) -> Int64[Tensor, "windows seq_len"]:
    windows = len(tokens) // seq_len
    return tokens[: windows * seq_len].view(windows, seq_len)


def too_little_text(source: str, available: int, asked: int, seq_len: int) -> UsageError:
    fewer = f"--samples {available}, " if available else ""
    return UsageError(
        f"{source!r} holds {available} windows of {seq_len} tokens, needed: {asked}. "
        f"Use {fewer}a smaller --seq-len or more text."
    )
