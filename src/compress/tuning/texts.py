"""Windows to train on, windows held out, and windows of another text, to see what else the training does.

Of a data set they come from its train split and its validation split, never from its test split; a file's last windows
are held out.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compress.datasets import SEPARATOR, load_rows
from compress.datasets._sources import is_file
from compress.datasets.windows import CHARACTERS_PER_TOKEN, Text, cut, encode, sample, too_little_text
from compress.errors import CompressError
from compress.tuning.settings import NUM_HELD_OUT

FILE_SHARE = 10  # of a file's windows one in so many is held out, at most
Windows = Int64[Tensor, "_ seq_len"]


@dataclass(frozen=True)
class Texts:
    """
    unlike: windows of a text of another kind, by its name; None where none is on this machine.
    """

    train: Windows
    held_out: Windows
    unlike: tuple[str, Windows] | None


@dataclass(frozen=True)
class Reader:
    """How texts become windows."""

    tokenizer: PreTrainedTokenizerBase
    seq_len: int
    seed: int
    data_dir: Path | None

    def texts(self, source: str, count: int | None, others: Iterable[str]) -> Texts:
        """
        count: windows to train on, None for all there are. others: texts that may be another kind, the best one first.
        """
        if is_file(source):
            train, held_out = self.of_file(source, count)
        else:
            train, held_out = self.drawn(source, "train", count), self.drawn(source, "validation", NUM_HELD_OUT)
        return Texts(train, held_out, self.unlike(source, others))

    def of_file(self, source: str, count: int | None) -> tuple[Windows, Windows]:
        windows = self.all_of(load_rows(source, "train", self.data_dir))
        if len(windows) < 2:
            raise too_little_text(source, len(windows), 2, self.seq_len)
        held_out = min(NUM_HELD_OUT, max(1, len(windows) // FILE_SHARE))
        return windows[:-held_out][:count], windows[-held_out:]

    def drawn(self, source: str, split: str, count: int | None) -> Windows:
        """From random places of a long text; all windows of one that is hardly longer than what is wanted."""
        rows = load_rows(source, split, self.data_dir)
        text = Text(source, rows)
        if count is not None and text.length >= CHARACTERS_PER_TOKEN * count * self.seq_len:
            return sample(text, self.tokenizer, count, self.seq_len, self.seed)
        windows = self.all_of(rows)
        if not len(windows):
            raise too_little_text(source, 0, 1, self.seq_len)
        return windows[torch.randperm(len(windows), generator=generator(self.seed))][:count]

    def all_of(self, rows: list[str]) -> Windows:
        return cut(encode(self.tokenizer, SEPARATOR.join(rows)), self.seq_len)

    def unlike(self, source: str, others: Iterable[str]) -> tuple[str, Windows] | None:
        for other in others:
            if other == source:
                continue
            try:
                if is_file(other):
                    return other, self.of_file(other, 1)[1]
                return other, self.drawn(other, "validation", NUM_HELD_OUT)
            except CompressError:
                continue  # not on this machine, or too short: the next one will do
        return None


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(windows: Windows, step: int, size: int, seed: int) -> Windows:
    """The windows of a step: the text over and over, in another order every time."""
    numbers = range(step * size, (step + 1) * size)
    orders = {
        epoch: torch.randperm(len(windows), generator=generator(seed + epoch))
        for epoch in {number // len(windows) for number in numbers}
    }
    return windows[[int(orders[number // len(windows)][number % len(windows)]) for number in numbers]]
